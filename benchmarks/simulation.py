"""What does simulating clients cost? Ways of training the same clients, in turns within one process.

    python benchmarks/simulation.py --batch-sizes 1,4,8 --repeats 5
    python benchmarks/simulation.py --base 64x2 --methods ours,swapped

Every client of the generated corpus makes the same number of optimiser steps on the same examples from the same factors
in each way. Ways take turns, repeat by repeat, so that a busy machine troubles all of them; a ratio is that of two
neighbours in time. Reported: median seconds, client-steps and tokens (padding not counted) per second, and the median
ratio to ``ours`` with its smallest and largest.

    ours         groups of clients share passes; one thread unless --threads says otherwise
    ours-alone   the same, one client at a time
    swapped      stock PEFT, one client at a time, its factors set by set_peft_model_state_dict; all cores
    swapped-1    the same with one thread
    central      stock PEFT LoRA training of the same tokens as one client in batches of --central-batch; all cores
    central-1    the same with one thread
"""

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch.nn import functional
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from flexlora.clients import Broadcast
from flexlora.config import load_config
from flexlora.data.pretraining import BASE_FOLDER
from flexlora.data.prompts import EncodedExample, encode_many
from flexlora.group_training import GroupJob, TrainedClient, train_group
from flexlora.lora.factors import Scaling
from flexlora.model import AdaptedModel, load_base_model, target_modules
from flexlora.participants import gather_participants
from flexlora.training import LocalTraining

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"
HEAD_WIDTH = 32
LEARNING_RATE = 1e-3
ALPHA = 2.0


@dataclass(frozen=True)
class Setting:
    """What every way trains: jobs whose examples are exactly those of all steps, in order."""

    make_network: Callable[[], PreTrainedModel]
    model: AdaptedModel
    jobs: Sequence[GroupJob]
    training: LocalTraining
    central_batch: int

    @property
    def num_tokens(self) -> int:
        return sum(len(example.input_ids) for job in self.jobs for example in job.examples)

    @property
    def num_steps(self) -> int:
        return sum(self.training.num_steps(len(job.examples)) for job in self.jobs)


def make_network(base: str, attention: str) -> PreTrainedModel:
    """Return the embedded base, or a random Llama of ``hidden x layers``."""
    if base == "embedded":
        return load_base_model(str(BASE_FOLDER), dtype="float32", device="cpu", attn_implementation=attention)[0]
    hidden, layers = map(int, base.split("x"))
    config = LlamaConfig(
        vocab_size=2560,
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD_WIDTH,
        num_key_value_heads=max(1, hidden // HEAD_WIDTH // 2),
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(config, attn_implementation=attention).eval()


def make_setting(arguments: argparse.Namespace, batch_size: int) -> Setting:
    """Return as many clients of the demo as asked for, with as many examples as their steps need."""
    config = load_config(CONFIG, [f"clients.distribution={arguments.distribution}"])
    participants = gather_participants(config)
    tokenizer = AutoTokenizer.from_pretrained(BASE_FOLDER)
    model = AdaptedModel(make_network(arguments.base, arguments.attention), tokenizer)
    shapes, scaling = target_modules(model.network, "all-linear"), Scaling("rslora", ALPHA)
    jobs = []
    for seed, client in enumerate(participants.clients[: arguments.clients]):
        examples = participants.corpus.clients[client.client_id].train
        wanted = [examples[index % len(examples)] for index in range(arguments.steps * batch_size)]
        encoded = encode_many(wanted, tokenizer, config.data.template, config.data.max_length)
        adapter = model.initial_adapter(client.plan.resolve(shapes), scaling, seed=0)
        jobs.append(GroupJob(Broadcast(adapter), encoded, LEARNING_RATE, seed))
    training = LocalTraining("adamw", batch_size=batch_size)
    return Setting(
        lambda: make_network(arguments.base, arguments.attention), model, jobs, training, arguments.central_batch
    )


def ours(setting: Setting, clients_per_group: int | None) -> Callable[[], None]:
    def train() -> None:
        outcomes = train_group(setting.model, setting.jobs, setting.training, clients_per_group)
        assert all(isinstance(outcome, TrainedClient) for outcome in outcomes)

    return train


def stock(network: PreTrainedModel, ranks: dict[str, int]) -> PeftModel:
    config = LoraConfig(
        r=max(ranks.values()), rank_pattern=ranks, lora_alpha=ALPHA, use_rslora=True, target_modules=list(ranks)
    )
    return get_peft_model(network, config).train()  # pyright: ignore[reportArgumentType]


def stock_steps(model: PeftModel, examples: Sequence[EncodedExample], batch_size: int) -> None:
    """Train as a plain loop over batches would: padding to the longest row, transformers' loss, fused AdamW."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=0.0, fused=True)
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        length = max(len(example.input_ids) for example in batch)
        tokens, labels = (
            torch.tensor([[*row, *[filler] * (length - len(row))] for row in rows])
            for rows, filler in (
                ([example.input_ids for example in batch], 0),
                ([example.labels for example in batch], -100),
            )
        )
        logits = model(input_ids=tokens, attention_mask=(tokens != 0).long()).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def swapped(setting: Setting) -> Callable[[], None]:
    # One stock model for each set of ranks, as a simulator of few device types would keep.
    models: dict[tuple[tuple[str, int], ...], PeftModel] = {}
    for job in setting.jobs:
        ranks = {path: factors.rank for path, factors in job.broadcast.trainable.items()}
        if tuple(ranks.items()) not in models:
            models[tuple(ranks.items())] = stock(setting.make_network(), ranks)

    def train() -> None:
        for job in setting.jobs:
            adapter = job.broadcast.trainable
            model = models[tuple((path, factors.rank) for path, factors in adapter.items())]
            state = {
                f"base_model.model.{path}.lora_{name}.weight": getattr(factors, name)
                for path, factors in adapter.items()
                for name in "AB"
            }
            set_peft_model_state_dict(model, state)
            stock_steps(model, job.examples, setting.training.batch_size)
            # What a client would send.
            {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}

    return train


def central(setting: Setting) -> Callable[[], None]:
    largest = max(
        (job.broadcast.trainable for job in setting.jobs),
        key=lambda adapter: sum(factors.rank for factors in adapter.values()),
    )
    model = stock(setting.make_network(), {path: factors.rank for path, factors in largest.items()})
    examples = [example for job in setting.jobs for example in job.examples]
    return lambda: stock_steps(model, examples, setting.central_batch)


# Name -> what it does and how many threads it takes; 0 is what --threads says, -1 all cores.
METHODS: dict[str, tuple[Callable[[Setting], Callable[[], None]], int]] = {
    "ours": (lambda setting: ours(setting, None), 0),
    "ours-alone": (lambda setting: ours(setting, 1), 0),
    "swapped": (swapped, -1),
    "swapped-1": (swapped, 1),
    "central": (central, -1),
    "central-1": (central, 1),
}


def measure(setting: Setting, names: Sequence[str], repeats: int, threads: int, clock: Callable[[], float]) -> None:
    trainers = {name: METHODS[name][0](setting) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats + 1):
        for name, train in trainers.items():
            torch.set_num_threads({0: threads, -1: os.cpu_count() or 1}.get(METHODS[name][1], METHODS[name][1]))
            start = clock()
            train()
            if repeat:  # The first warms up.
                seconds[name].append(clock() - start)
    for name, own in seconds.items():
        median = statistics.median(own)
        line = f"  {name:12s}{median:9.2f} s{setting.num_steps / median:10.1f} client-steps/s"
        line += f"{setting.num_tokens / median:10.0f} tokens/s"
        if name != names[0]:
            ratios = [theirs / ours for theirs, ours in zip(own, seconds[names[0]], strict=True)]
            line += f"   {names[0]} is {statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
        print(line, flush=True)


def main() -> None:
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="embedded", help="embedded, or HIDDENxLAYERS such as 64x2")
    parser.add_argument("--batch-sizes", default="1,4,8")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4, help="optimiser steps of each client")
    parser.add_argument("--distribution", default="uniform", help="of the four small device types")
    parser.add_argument("--methods", default="ours,swapped,swapped-1,central,central-1")
    parser.add_argument("--central-batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--attention", default="sdpa", choices=("sdpa", "eager"))
    parser.add_argument("--cpu-time", action="store_true", help="count processor seconds: fairer where others are busy")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    for batch_size in map(int, arguments.batch_sizes.split(",")):
        setting = make_setting(arguments, batch_size)
        print(
            f"{arguments.base}, {setting.model.num_parameters:,} parameters; {len(setting.jobs)} clients, "
            f"{arguments.steps} steps of batch {batch_size}, {setting.num_tokens:,} tokens"
        )
        measure(setting, arguments.methods.split(","), arguments.repeats, arguments.threads, clock)


if __name__ == "__main__":
    main()
