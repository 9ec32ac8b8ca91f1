"""How much memory does merging take, and does it grow with the number of adapters or of modules?

    python benchmarks/merge_memory.py                                 # 100 and 1,000 adapters, and a whole model
    python benchmarks/merge_memory.py --cases 1000x2 --spectrum flat  # the hard case

Each case ``ADAPTERSxMODULES`` makes adapter folders in bfloat16 of a Llama's shapes (7B by default), at ranks 4, 8, 16,
32 and 64 in turn, merges them in a process of its own at rank 64, watches that process, and deletes the folders.
``anonymous`` is the peak of resident memory that belongs to no file, which is what counts against a machine; pages of
the adapters' files are the page cache's and go when others need them. ``grown`` is that peak without what the imports
alone take. Adapters of the spectrum ``common`` perturb one update whose singular values fall from 1 to 1e-3; those of
``flat`` are random and have nothing in common, so that no method can do with less than the whole sum.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

RANKS = (4, 8, 16, 32, 64)
KINDS = ("self_attn.q_proj", "mlp.down_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
KINDS = (*KINDS, "mlp.gate_proj", "mlp.up_proj")
COLUMNS = ("adapters", "modules", "factors", "anonymous", "grown", "file pages", "seconds", "methods")


def module_shapes(num_modules: int, hidden: int) -> dict[str, tuple[int, int]]:
    """Path -> (out_features, in_features), as in a Llama whose feed-forward part is 2.6875 times as wide."""
    wide = hidden * 43 // 16
    shapes = {}
    for place in range(num_modules):
        layer, kind = divmod(place, len(KINDS))
        sides = (
            (hidden, wide) if "down" in KINDS[kind] else (wide, hidden) if "mlp" in KINDS[kind] else (hidden, hidden)
        )
        shapes[f"model.layers.{layer}.{KINDS[kind]}"] = sides
    return shapes


def common_factors(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return factors of one update of the largest rank, whose singular values fall from 1 to 1e-3."""
    generator = torch.Generator().manual_seed(sum(shape))
    rank = max(RANKS)
    B, A = (torch.randn(side, rank, generator=generator) / side**0.5 for side in shape)
    return B * torch.logspace(0, -3, rank), A.T


def make_adapter(folder: Path, shapes: dict[str, tuple[int, int]], rank: int, seed: int, spectrum: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, (out_features, in_features) in shapes.items():
        A = torch.randn(rank, in_features, generator=generator) / in_features**0.5
        B = torch.randn(out_features, rank, generator=generator) / out_features**0.5
        if spectrum == "common":
            common_B, common_A = common_factors((out_features, in_features))
            A = common_A[:rank] + 0.3 * A
            B = common_B[:, :rank] + 0.3 * B * torch.logspace(0, -3, max(RANKS))[:rank]
        tensors[f"base_model.model.{path}.lora_A.weight"] = A.bfloat16().contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = B.bfloat16().contiguous()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "base_model_name_or_path": "llama"}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": list(KINDS)}))


def memory() -> dict[str, int]:
    """Resident memory of this process in bytes, by what it belongs to."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = {line.split(":")[0]: line.split() for line in lines}
    return {"anonymous": 1024 * int(fields["RssAnon"][1]), "files": 1024 * int(fields["RssFile"][1])}


def merge_and_watch(folder: Path, accuracy: str) -> dict[str, object]:
    """Merge the adapters in ``folder`` and return the peaks of this process."""
    from flexlora.adapters.merge import merge

    peaks, finished = memory(), threading.Event()
    start = peaks["anonymous"]

    def watch() -> None:
        while not finished.wait(0.01):
            for name, size in memory().items():
                peaks[name] = max(peaks[name], size)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    adapters = sorted(folder.glob("adapter-*"))
    result = merge(adapters, rank=max(RANKS), accuracy=accuracy, out=folder / "merged")  # type: ignore[arg-type]
    seconds = time.perf_counter() - began
    finished.set()
    watcher.join()
    return {
        "seconds": seconds,
        "anonymous_bytes": peaks["anonymous"],
        "grown_bytes": peaks["anonymous"] - start,
        "file_bytes": peaks["files"],
        "energy_kept": result.energy_kept,
        "methods": dict(Counter(module.certificate.method for module in result.modules)),
    }


def measure(num_adapters: int, num_modules: int, arguments: argparse.Namespace) -> dict[str, object]:
    shapes = module_shapes(num_modules, arguments.hidden)
    with tempfile.TemporaryDirectory(prefix="merge-memory-", dir=arguments.folder) as folder:
        for number in range(num_adapters):
            rank = RANKS[number % len(RANKS)]
            make_adapter(Path(folder, f"adapter-{number:04d}"), shapes, rank, number, arguments.spectrum)
        stored = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
        # A process of its own: what making the adapters took must not count.
        command = [sys.executable, __file__, "--accuracy", arguments.accuracy, "--watch", folder]
        found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return {"num_adapters": num_adapters, "num_modules": num_modules, "adapter_bytes": stored, **found}


def cells(row: dict) -> list[str]:
    sizes = [f"{row[name] / 1e6:.0f} MB" for name in ("adapter_bytes", "anonymous_bytes", "grown_bytes", "file_bytes")]
    methods = ", ".join(f"{name} {count}" for name, count in row["methods"].items())
    return [f"{row['num_adapters']}", f"{row['num_modules']}", *sizes, f"{row['seconds']:.1f}", methods]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="100x2,1000x2,3x224", help="ADAPTERSxMODULES, with commas between.")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--spectrum", choices=["common", "flat"], default="common")
    parser.add_argument("--accuracy", choices=["exact", "fast"], default="exact")
    parser.add_argument("--folder", help="Where there is room for the adapters; default the system's temporary folder.")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--watch", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.watch:
        print(json.dumps(merge_and_watch(arguments.watch, arguments.accuracy)))
        return
    rows = []
    if not arguments.json:
        print(("{:>10}" * 7).format(*COLUMNS), "", COLUMNS[7])
    for case in arguments.cases.split(","):
        num_adapters, num_modules = (int(number) for number in case.split("x"))
        rows.append(measure(num_adapters, num_modules, arguments))
        if not arguments.json:
            *numbers, methods = cells(rows[-1])
            print(("{:>10}" * 7).format(*numbers), "", methods, flush=True)
    if arguments.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
