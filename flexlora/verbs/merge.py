"""The verb ``merge``: merges LoRA adapters of any ranks, or inspects one."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from flexlora.errors import FlexLoraError
from flexlora.files import file_above
from flexlora.progress import stage
from flexlora.verbs.arguments import JsonOption, PadToOption, RanksOption, UniformOption, check_uniform
from flexlora.verbs.leaving import interruptible
from flexlora.verbs.terminal import err, out, print_json

AdaptersArgument = Annotated[
    list[str] | None, typer.Argument(metavar="ADAPTER", help="PEFT folders, or ids on the Hugging Face hub.")
]
WeightsOption = Annotated[str | None, typer.Option("--weights", help="One per adapter, as 3,1,1; default all 1.")]
MergeMethodOption = Annotated[
    Literal["mean", "sum"],
    typer.Option("--method", help="mean divides the weights by their sum; sum takes them as they are, signs included."),
]
MergeRankOption = Annotated[
    int | None,
    typer.Option("--rank", min=1, help="Rank of every module; default the largest that an adapter has there."),
]
EnergyOption = Annotated[
    float | None, typer.Option("--energy", help="Least rank that keeps this share of the energy, as 0.99.")
]
ExactOption = Annotated[bool, typer.Option("--exact", help="Keep every direction that the sum has.")]
MissingOption = Annotated[
    Literal["zero", "renormalise"],
    typer.Option("--missing", help="A module that an adapter lacks counts as unchanged, or is left out of the mean."),
]
AccuracyOption = Annotated[
    Literal["exact", "fast"],
    typer.Option("--accuracy", help="Within 1e-6 or within 1e-3 of the best approximation of its rank."),
]
DtypeOption = Annotated[
    Literal["float32", "bfloat16", "float16"], typer.Option("--dtype", help="Of the factors written.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="Where to compute: cpu, cuda or cuda:N.")]
DifferentBasesOption = Annotated[
    bool, typer.Option("--allow-different-bases", help="Take adapters that name different base models.")
]
ExplainOption = Annotated[
    bool, typer.Option("--explain", help="Show how each module was decomposed and why; every one with --inspect.")
]
InspectOption = Annotated[
    str | None, typer.Option("--inspect", metavar="ADAPTER", help="Show the spectrum of one adapter instead.")
]
MergeOutOption = Annotated[
    Path | None,
    typer.Option("--out", help="Folder to write; with --inspect a picture (.svg, .png or .pdf). Must not exist."),
]


def merge(
    adapters: AdaptersArgument = None,
    weights: WeightsOption = None,
    method: MergeMethodOption = "mean",
    rank: MergeRankOption = None,
    energy: EnergyOption = None,
    exact: ExactOption = False,
    missing: MissingOption = "zero",
    accuracy: AccuracyOption = "exact",
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    allow_different_bases: DifferentBasesOption = False,
    ranks: RanksOption = "uniform",
    uniform: UniformOption = False,
    pad_to: PadToOption = None,
    explain: ExplainOption = False,
    inspect: InspectOption = None,
    target: MergeOutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Merge LoRA adapters of any ranks, exactly, or inspect one."""
    from flexlora.adapters.merge_numbers import check_device_name, check_directions, check_weights
    from flexlora.adapters.rank_layout import RankLayout

    if inspect is not None:
        if adapters or (weights, rank, energy, exact) != (None, None, None, False):
            more = f"{len(adapters)} more" if adapters else "--weights, --rank, --energy or --exact too"
            raise FlexLoraError(f"--inspect shows one adapter and merges nothing; got {more}")
        _inspect(inspect, target, every_module=explain, as_json=as_json)
        return
    if not adapters or target is None:
        raise FlexLoraError("merging needs adapters and the folder to write: flexlora merge A B --out DIR")
    check_uniform(uniform, ranks)
    numbers = _numbers(weights) if weights is not None else None
    check_weights(numbers or [1.0] * len(adapters), len(adapters), method, missing)
    check_directions(rank, energy, exact)
    check_device_name(device)
    RankLayout(ranks, pad_to)
    _check_paths(adapters, target)
    with stage(err, "Loading libraries", hidden=as_json):
        # Only here: loading torch takes seconds, and a mistake is told before.
        from flexlora.adapters.merge import merge as merge_adapters
        from flexlora.adapters.terminal import module_progress, print_merge

    with interruptible("nothing was written"), module_progress(err, "merging", hidden=as_json) as progress:
        result = merge_adapters(
            adapters,
            numbers,
            out=target,
            method=method,
            rank=rank,
            energy=energy,
            exact=exact,
            missing=missing,
            accuracy=accuracy,
            device=device,
            dtype=dtype,
            allow_different_bases=allow_different_bases,
            ranks=ranks,
            pad_to=pad_to,
            notify=progress,
        )
    if as_json:
        print_json(result.to_json())
    else:
        print_merge(out, result, explain=explain)


def _check_paths(adapters: Sequence[str], target: Path | None = None) -> None:
    """Raise if a folder that is here holds no adapter, or the one to write exists; the hub is asked later."""
    from flexlora.adapters.peft_settings import read_config

    for name in adapters:
        if Path(name).exists() or name.count("/") != 1:
            read_config(Path(name), name)
    if target is not None and os.path.lexists(target):
        raise FlexLoraError(f"--out must not exist yet; {target} does")
    if target is not None and (file := file_above(target)):
        raise FlexLoraError(f"--out: {file} is a file; a folder is needed there")


def _inspect(adapter: str, picture: Path | None, *, every_module: bool, as_json: bool) -> None:
    from flexlora.adapters.peft_format import PICTURE_ENDINGS

    if picture is not None and (picture.suffix not in PICTURE_ENDINGS or os.path.lexists(picture)):
        raise FlexLoraError(
            f"--out must be a new file that ends in {', '.join(PICTURE_ENDINGS)} with --inspect; got {picture}"
        )
    _check_paths([adapter], picture)
    with stage(err, "Loading libraries", hidden=as_json):
        from flexlora.adapters.inspection import inspect_adapter
        from flexlora.adapters.terminal import module_progress, print_inspection

    with interruptible("nothing was written"):
        with module_progress(err, "inspecting", hidden=as_json) as progress:
            found = inspect_adapter(adapter, progress)
        if picture is not None:
            # Only here: it takes a second, and only pictures need it.
            from flexlora.adapters.figure import write_picture

            write_picture(found, picture)
    if as_json:
        print_json({**found.to_json(), "picture": None if picture is None else str(picture)})
        return
    print_inspection(out, found, every_module=every_module)
    if picture is not None:
        out.print(f"Wrote {picture}", highlight=False, markup=False, soft_wrap=True)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise FlexLoraError(f"--weights must be numbers separated by commas, as 3,1,1; got {text}") from None
