"""Does any damage to files go unnoticed, end in a traceback, or take long?

    python benchmarks/damage.py runs 1500      # flipped bits over all files of a run folder, then a resume
    python benchmarks/damage.py configs 300    # random damage to a configuration, then reading it
    python benchmarks/damage.py models 100     # random damage to a model folder, then loading it
    python benchmarks/damage.py adapters 100   # random damage to an adapter folder, then merging it with a whole one

All in one process, on a tiny random model, so that a resume takes a fraction of a second. After a resume, everything
that a run leaves is compared with what the whole run left, wall times apart; a trial ends ``right`` (perhaps from the
checkpoint before), ``refused`` (an error of ours), ``silent`` (another result without a word) or ``crashed``. Older
checkpoints are not compared: nothing reads them as long as the newest is whole. For the other three, nothing but the
settings or the weights themselves says what is right: a trial ends ``accepted`` or ``refused``, and only ``crashed``
and the time count. Flips take each file equally often, whatever its size.
"""

import argparse
import json
import logging
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from flexlora.adapters.merge import merge
from flexlora.adapters.write import write_adapter
from flexlora.data.pretraining import BASE_FOLDER
from flexlora.errors import FlexLoraError
from flexlora.experiment import run as run_module
from flexlora.experiment.config import Config
from flexlora.experiment.config_file import dump_config, load_config, parse_config
from flexlora.experiment.loaded import LoadedRun
from flexlora.experiment.run import run_experiment
from flexlora.lora.factors import LoraFactors
from flexlora.training.base_model import load_base_model

SLOW_SECONDS = 10.0
TOLD_EVERY = 100
VOLATILE = ("seconds", "started", "digest")


@dataclass
class Outcomes:
    """How trials ended, what went wrong, and the slowest of them in CPU seconds."""

    counts: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    slowest: float = 0.0

    def add(self, trial: Callable[[], str], what: str) -> None:
        """Run a trial and note its end."""
        start = time.process_time()
        try:
            ended = trial()
        except FlexLoraError:
            ended = "refused"
        except Exception as error:
            ended = "crashed"
            self.bad.append(f"{what}: {type(error).__name__}: {str(error)[:300]}")
        if ended == "silent":
            self.bad.append(f"{what}: another result")
        seconds = time.process_time() - start
        if seconds > SLOW_SECONDS:
            self.bad.append(f"{what}: {seconds:.1f} s")
        self.slowest = max(self.slowest, seconds)
        self.counts[ended] += 1
        if self.counts.total() % TOLD_EVERY == 0:
            print(self, flush=True)

    def __str__(self) -> str:
        """Return the counts in words."""
        counts = ", ".join(f"{count} {ended}" for ended, count in sorted(self.counts.items()))
        return f"{counts}; slowest {self.slowest:.2f} s of CPU time; {len(self.bad)} bad"


def tiny_model(folder: Path) -> Path:
    """Write a random Llama of one layer with the tokenizer of the embedded base."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(BASE_FOLDER)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_config(model: Path, root: Path) -> Config:
    """Return a run of three rounds of two clients each, with one reference run."""
    return parse_config(
        {
            "model": {"name_or_path": str(model), "num_threads": 1, "num_processes": 1, "device": "cpu"},
            "data": {
                "name": "generated",
                "num_clients": 4,
                "examples_per_task": 10,
                "num_unseen_tasks": 1,
                "test_examples_per_task": 1,
                "validation_examples": 2,
                "max_length": 64,
                "cache": str(root / "cache"),
            },
            "lora": {"lora_alpha": 8.0},
            "clients": {"types": {"small": {"attention": 1, "ffn": 1}, "large": {"attention": 2, "ffn": 3}}}
            | {"distribution": {"small": 1, "large": 1}},
            "rounds": {"num_rounds": 3, "cohort_size": 2},
            "training": {"max_steps": 1},
            "evaluation": {
                "every": 3,
                "max_new_tokens": 1,
                "local_only_clients": 0,
                "rank_group_clients": 0,
                "fedit_reference": True,
            },
        },
        "damage",
    )


def share_loading() -> None:
    """Let all runs of this process use the first one's data and base model, which are not what is damaged."""
    gather, load, kept = run_module.gather_participants, LoadedRun.load, {}

    def gathered(*given: Any) -> Any:
        """Return the participants of the first call."""
        return kept.setdefault("participants", gather(*given) if "participants" not in kept else None)

    def loaded(*given: Any) -> Any:
        """Return the loaded run of the first call."""
        return kept.setdefault("loaded", load(*given) if "loaded" not in kept else None)

    run_module.gather_participants = gathered
    LoadedRun.load = staticmethod(loaded)


def left_behind(folder: Path) -> dict[str, Any]:
    """Return what a run left, wall times apart: scores, settings, checkpoints and adapters."""
    found: dict[str, Any] = {}
    newest = {max(place.glob("round-*")) for place in folder.rglob("checkpoints")}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if "checkpoints" in path.parts and path.parent not in newest:
            continue  # An older checkpoint is there for the case that the newest is damaged.
        if path.suffix == ".jsonl":
            found[name] = [_untimed(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.name in ("manifest.json", "references.json"):
            found[name] = _untimed(json.loads(path.read_text()))
        elif path.name == "state.json":
            value = json.loads(path.read_text())
            # The record in it and the digests of records hold wall times.
            value["progress"]["record"] = _untimed(json.loads(value["progress"]["record"]))
            value["progress"]["loop"]["history"] = len(value["progress"]["loop"]["history"])
            found[name] = _untimed(value)
        elif path.name != "report.html":
            found[name] = path.read_bytes()
        else:
            found[name] = len(path.read_bytes()) > 0
    return found


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _untimed(part) for key, part in value.items() if key not in VOLATILE}
    return [_untimed(part) for part in value] if isinstance(value, list) else value


def flip(path: Path, rng: random.Random) -> str:
    """Flip one bit of a file and return which."""
    content = bytearray(path.read_bytes())
    place, bit = rng.randrange(len(content)), rng.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return f"{path.name} byte {place} bit {bit}"


def damage(path: Path, rng: random.Random) -> str:
    """Damage a file in one of the ways in which files break, and return how."""
    content = path.read_bytes()
    kind = rng.choice(("flip", "flip", "cut", "empty", "repeat", "swap", "number", "gone", "noise", "line"))
    place = rng.randrange(max(1, len(content)))
    if kind == "gone":
        path.unlink()
    elif kind in ("cut", "empty"):
        path.write_bytes(content[: place if kind == "cut" else 0])
    elif kind == "repeat":
        path.write_bytes(content[:place] + content[place : place + rng.randrange(1, 200)] * rng.randrange(2, 50))
    elif kind == "swap":
        size = rng.randrange(1, 50)
        path.write_bytes(content[:place] + content[place + size :] + content[place : place + size])
    elif kind == "number":
        digits = [index for index, byte in enumerate(content[:100_000]) if 48 <= byte <= 57]
        if digits:
            index = rng.choice(digits)
            new = rng.choice((b"99999999999", b"-1", b"1e999", b"NaN", b"0", b"null", b'"x"', b"[[[[", b"2024-13-45"))
            path.write_bytes(content[:index] + new + content[index + 1 :])
    elif kind == "line":
        lines = content.split(b"\n")
        index = rng.randrange(len(lines))
        new = rng.choice(
            (b"\x1b[31m: x", b"- a", b"  key: [", b"? {a: b}", b"!!python/none x", b"a: *b", b'"\\ud800": 1')
        )
        path.write_bytes(b"\n".join([*lines[:index], new, *lines[index + rng.randrange(2) :]]))
    elif kind == "noise":
        path.write_bytes(content[:place] + rng.randbytes(rng.randrange(1, 40)) + content[place:])
    else:
        return flip(path, rng) if content else "nothing"
    return f"{path.name} {kind} at {place}"


def fuzz_runs(number: int, seed: int, root: Path) -> Outcomes:
    """Flip one bit of a run folder at a time and resume."""
    rng, outcomes = random.Random(seed), Outcomes()
    config = tiny_config(tiny_model(root / "model"), root)
    share_loading()
    whole, copy = root / "whole", root / "copy"
    run_experiment(config, whole)
    expected = left_behind(whole)
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    for trial in range(number):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        name = files[trial % len(files)]
        what = f"{name.parent}/{flip(copy / name, rng)}"
        if name.parts[0] == "references":
            # Else it would be known how the reference ended, and its folder would not be looked into.
            (copy / "references.json").unlink()

        def resumed() -> str:
            """Resume and compare."""
            run_experiment(config, copy, resume=True)
            return "right" if left_behind(copy) == expected else "silent"

        outcomes.add(resumed, what)
    return outcomes


def fuzz_configs(number: int, seed: int, root: Path) -> Outcomes:
    """Damage a whole configuration and read it."""
    rng, outcomes = random.Random(seed), Outcomes()
    texts = [dump_config(Config())]
    texts += [path.read_text() for path in sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))]
    path = root / "config.yaml"
    for _ in range(number):
        path.write_text(rng.choice(texts), encoding="utf-8")
        what = ", ".join(damage(path, rng) for _ in range(rng.randrange(1, 4)) if path.exists())
        outcomes.add(
            lambda: (load_config(path), "accepted")[1], f"{what}: {path.read_bytes()!r:.200}" if path.exists() else what
        )
    return outcomes


def fuzz_models(number: int, seed: int, root: Path) -> Outcomes:
    """Damage the folder of a base model and load it."""
    rng, outcomes = random.Random(seed), Outcomes()
    whole, copy = tiny_model(root / "model"), root / "copy"

    def loaded() -> str:
        """Load it."""
        load_base_model(str(copy), dtype="float32", device="cpu", attn_implementation="eager")
        return "accepted"

    files = sorted(path.name for path in whole.iterdir())
    for trial in range(number):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        outcomes.add(loaded, damage(copy / files[trial % len(files)], rng))
    return outcomes


def fuzz_adapters(number: int, seed: int, root: Path) -> Outcomes:
    """Damage the folder of an adapter and merge it with a whole one."""
    rng, outcomes = random.Random(seed), Outcomes()
    generator = torch.Generator().manual_seed(0)
    adapters = [
        {
            f"model.layers.{layer}.self_attn.{name}": LoraFactors(
                torch.randn(rank + layer, 12, generator=generator),
                torch.randn(8, rank + layer, generator=generator),
                0.5,
            )
            for layer in range(3)
            for name in ("q_proj", "v_proj")
        }
        for rank in (2, 3)
    ]
    for name, adapter in zip(("one", "other"), adapters, strict=True):
        write_adapter(root / name, adapter, "base")
    copy, merged = root / "copy", root / "merged"

    def tried() -> str:
        """Merge."""
        shutil.rmtree(merged, ignore_errors=True)
        merge([copy, root / "other"], out=merged)
        return "accepted" if load_file(merged / "adapter_model.safetensors") else "silent"

    files = sorted(path.name for path in (root / "one").iterdir())
    for trial in range(number):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(root / "one", copy)
        outcomes.add(tried, damage(copy / files[trial % len(files)], rng))
    return outcomes


KINDS = {"runs": fuzz_runs, "configs": fuzz_configs, "models": fuzz_models, "adapters": fuzz_adapters}


def main() -> None:
    """Run trials of one kind and print how they ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("number", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", action="store_true", help="show the warnings of the log")
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING if given.log else logging.CRITICAL)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        outcomes = KINDS[given.kind](given.number, given.seed, Path(root))
    print(outcomes)
    for line in outcomes.bad:
        print(f"  {line}")
    sys.exit(bool(outcomes.bad))


if __name__ == "__main__":
    main()
