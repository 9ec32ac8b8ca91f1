"""What do generated answers cost? Ours against transformers' generate, greedy, in turns within one process.

    python benchmarks/generation.py --base smollm2 --tasks /path/to/natural-instructions/tasks
    python benchmarks/generation.py --dtype bfloat16 --rows 32 --new-tokens 32

Prompts are those of the tasks in the folder, or of the generated corpus, by the model's chat template. Ways take turns,
repeat by repeat; a ratio is that of two neighbours in time. Reported: median seconds, and the median ratio to ``ours``
with its smallest and largest, for generate in batches of prompts as they come and sorted by length. What is generated
must be the same tokens, but for ties that rounding decides: the share of equal answers is printed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from flexlora.data.examples import Example
from flexlora.data.pretraining import BASE_FOLDER
from flexlora.data.prompts import encode_prompts, padding_token
from flexlora.experiment.config_file import load_config
from flexlora.experiment.participants import gather_participants
from flexlora.limits import num_cores
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.base_model import load_base_model
from flexlora.training.generation import generate

ROOT = Path(__file__).parents[1]
BASES = {"smollm2": ROOT / "models" / "smollm2-135m-instruct", "embedded": BASE_FOLDER}


def examples_of(tasks: Path | None, number: int) -> list[Example]:
    """Return one example each of so many tasks, spread over a folder or over the generated corpus."""
    if tasks is None:
        corpus = gather_participants(load_config(ROOT / "configs" / "demo.yaml", [])).corpus
        return [own.test[0] for _, own in sorted(corpus.unseen.items())][:number]
    files = sorted(tasks.glob("*.json"))
    found = []
    for file in files[:: max(1, len(files) // number)][:number]:
        task = json.loads(file.read_text(encoding="utf-8"))
        instance = task["Instances"][0]
        found.append(Example(task["Definition"][0], instance["input"], tuple(instance["output"])))
    return found


def stock(
    model: AdaptedModel, prompts: Sequence[list[int]], new_tokens: int, rows: int, by_length: bool
) -> list[list[int]]:
    """Generate with transformers, in batches padded on the left, and cut answers at their end."""
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]) if by_length else index)
    padding, end = padding_token(model.tokenizer), model.tokenizer.eos_token_id
    answers: list[list[int]] = [[] for _ in prompts]
    network: Any = model.network
    for start in range(0, len(order), rows):
        batch = [prompts[index] for index in order[start : start + rows]]
        width = max(map(len, batch))
        with torch.no_grad():
            whole = network.generate(
                input_ids=torch.tensor([[padding] * (width - len(prompt)) + prompt for prompt in batch]),
                attention_mask=torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch]),
                max_new_tokens=new_tokens,
                do_sample=False,
                repetition_penalty=1.0,
                pad_token_id=padding,
            )
        for index, tokens in zip(order[start : start + rows], whole[:, width:].tolist(), strict=True):
            answers[index] = tokens[: tokens.index(end)] if end in tokens else tokens
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2", help="smollm2, embedded, or a folder")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--tasks", type=Path, help="folder of Natural Instructions; without it the generated corpus")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--longest", type=int, default=300, help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rows", type=int, default=16, help="prompts in a batch of generate; ours takes 64")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(num_cores())
    model = AdaptedModel(
        *load_base_model(str(BASES.get(options.base, options.base)), dtype=options.dtype, device="cpu")
    )
    template = "chat" if model.tokenizer.chat_template else "alpaca"
    prompts = [
        list(prompt)
        for prompt in encode_prompts(
            examples_of(options.tasks, options.prompts), model.tokenizer, template, options.longest
        )
    ]
    lengths = sorted(map(len, prompts))
    print(
        f"{options.base}, {options.dtype}, {len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens, median "
        f"{lengths[len(lengths) // 2]}; {options.new_tokens} new ones at most"
    )
    ways: dict[str, Callable[[], list[list[int]]]] = {
        "ours": lambda: generate(model, prompts, options.new_tokens),
        "generate": lambda: stock(model, prompts, options.new_tokens, options.rows, False),
        "generate, sorted": lambda: stock(model, prompts, options.new_tokens, options.rows, True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    said: dict[str, list[list[int]]] = {}
    for repeat in range(options.repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            said[name] = way()
            if repeat:  # The first warms up.
                seconds[name].append(time.perf_counter() - start)
    for name, own in seconds.items():
        line = f"  {name:18s}{statistics.median(own):8.2f} s"
        if name != "ours":
            ratios = [theirs / ours for theirs, ours in zip(own, seconds["ours"], strict=True)]
            same = sum(left == right for left, right in zip(said[name], said["ours"], strict=True))
            line += f"   ours is {statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
            line += f"   {same} of {len(prompts)} answers are the same"
        print(line, flush=True)


if __name__ == "__main__":
    main()
