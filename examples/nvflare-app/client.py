"""Trains the adapter of one client: NVFlare's Client API, a PEFT model of the client's own rank, a plain loop."""

import argparse
import random
from typing import Any

import nvflare.client as flare
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import flexlora
from flexlora.nvflare import load_received, reply_of

BASE = flexlora.resolve_base_model("embedded")  # Yours: a folder or a hub id.
LORA_ALPHA = 16
TARGET_MODULES = ["q_proj", "v_proj"]


def load_model(rank: int) -> PeftModel:
    """Return the base with an adapter of this rank; its first values do not matter."""
    base = AutoModelForCausalLM.from_pretrained(BASE)
    return get_peft_model(base, LoraConfig(r=rank, lora_alpha=LORA_ALPHA, target_modules=TARGET_MODULES))


def texts(site: str, num_texts: int) -> list[str]:
    """Return this site's own data: sums of numbers, each site with other words around them."""
    rng = random.Random(site)
    pairs = [(rng.randrange(50), rng.randrange(50)) for _ in range(num_texts)]
    return [f"{site} adds {one} and {other} and has {one + other}." for one, other in pairs]


def train(model: PeftModel, tokenizer: Any, data: list[str], learning_rate: float = 5e-3) -> float:
    """Train for one pass over the data, four texts a step, and return the mean loss in nats."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    losses = []
    for start in range(0, len(data), 4):
        batch = tokenizer(data[start : start + 4], return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses) / len(losses)


def main(rank: int, num_texts: int) -> None:
    """Take part until the server has no more rounds."""
    torch.set_num_threads(1)
    flare.init()
    model, tokenizer = load_model(rank), AutoTokenizer.from_pretrained(BASE)
    data = texts(flare.get_site_name(), num_texts)
    while flare.is_running():
        received = flare.receive()
        load_received(model, received)
        loss = train(model, tokenizer, data)
        print(f"round {received.current_round} at rank {rank}: loss {loss:.3f}")
        flare.send(reply_of(model, len(data)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--num-texts", type=int, default=16)
    arguments = parser.parse_args()
    main(arguments.rank, arguments.num_texts)
