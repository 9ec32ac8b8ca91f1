"""How much memory does merging take, and does it grow with the number of adapters or of modules?

    python benchmarks/merge_memory.py --adapters 1000 --modules 2 --out runs/merge-memory-many
    python benchmarks/merge_memory.py --adapters 8 --modules 224 --out runs/merge-memory-deep

Makes adapter folders in bfloat16 of a Llama's shapes (7B by default), at ranks 4, 8, 16, 32 and 64 in turn, merges them
in a process of its own at rank 64 and watches that process: ``anonymous`` is resident memory that belongs to no file,
which is what counts against a machine; pages of the adapters' files are the page cache's and go when others need them.
``grown`` is the peak without what the imports alone take. OUT is made anew and can be deleted.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

RANKS = (4, 8, 16, 32, 64)
KINDS = ("self_attn.q_proj", "mlp.down_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
KINDS = (*KINDS, "mlp.gate_proj", "mlp.up_proj")


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


def make_adapter(folder: Path, shapes: dict[str, tuple[int, int]], rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, (out_features, in_features) in shapes.items():
        prefix = f"base_model.model.{path}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, in_features, generator=generator).bfloat16()
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(out_features, rank, generator=generator).bfloat16()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "base_model_name_or_path": "llama"}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": list(KINDS)}))


def memory() -> dict[str, int]:
    """Resident memory of this process in bytes, by what it belongs to."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = {line.split(":")[0]: line.split() for line in lines}
    return {"anonymous": 1024 * int(fields["RssAnon"][1]), "files": 1024 * int(fields["RssFile"][1])}


def merge_and_watch(out: Path, accuracy: str) -> dict[str, float]:
    """Merge the adapters under ``out`` and return the peaks of this process."""
    from flexlora.merging import merge

    peaks, finished = memory(), threading.Event()
    start = peaks["anonymous"]

    def watch() -> None:
        while not finished.wait(0.01):
            for name, size in memory().items():
                peaks[name] = max(peaks[name], size)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    folders = sorted(path for path in out.iterdir() if path.name.startswith("adapter-"))
    result = merge(folders, rank=max(RANKS), accuracy=accuracy, out=out / "merged")  # type: ignore[arg-type]
    seconds = time.perf_counter() - began
    finished.set()
    watcher.join()
    return {
        "seconds": seconds,
        "anonymous_bytes": peaks["anonymous"],
        "grown_bytes": peaks["anonymous"] - start,
        "file_bytes": peaks["files"],
        "energy_kept": result.energy_kept,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--modules", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--accuracy", choices=["exact", "fast"], default="exact")
    parser.add_argument("--out", type=Path, required=True, help="Folder to make.")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--watch", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.watch:
        print(json.dumps(merge_and_watch(arguments.out, arguments.accuracy)))
        return
    shapes = module_shapes(arguments.modules, arguments.hidden)
    for number in range(arguments.adapters):
        make_adapter(arguments.out / f"adapter-{number:04d}", shapes, RANKS[number % len(RANKS)], number)
    stored = sum(path.stat().st_size for path in arguments.out.rglob("*.safetensors"))
    # A process of its own: what making the adapters took must not count.
    command = [sys.executable, __file__, "--watch", "--accuracy", arguments.accuracy, "--out", str(arguments.out)]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    found |= {"num_adapters": arguments.adapters, "num_modules": arguments.modules, "adapter_bytes": stored}
    if arguments.json:
        print(json.dumps(found))
        return
    print(f"{arguments.adapters} adapters, {arguments.modules} modules, {stored / 1e9:.2f} GB of factors")
    print(
        f"peak anonymous  {found['anonymous_bytes'] / 1e6:8.0f} MB, "
        f"{found['grown_bytes'] / 1e6:.0f} MB of it on top of the imports"
    )
    print(f"peak file pages {found['file_bytes'] / 1e6:8.0f} MB")
    print(f"merged in       {found['seconds']:8.1f} s")


if __name__ == "__main__":
    main()
