"""Tables of a merge and of an adapter, as they appear in a narrow terminal and in a pipe."""

from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from flexlora.adapters.inspection import Inspection, ModuleSpectrum
from flexlora.adapters.merge_result import MergedModule, MergeResult
from flexlora.adapters.terminal import bar, module_progress, print_inspection, print_merge, spark
from flexlora.lora.certificate import Certificate


def result_of(num_layers: int) -> MergeResult:
    modules = tuple(
        MergedModule(
            f"model.layers.{layer}.self_attn.{name}",
            (8, 4),
            (2, 4) if layer else (2,),
            4,
            0.99 - 0.001 * layer,
            Certificate("qr", "total rank 6 is small", 2.0, 0.1, excess=1e-7),
            4,
        )
        for layer in range(num_layers)
        for name in ("q_proj", "v_proj")
    )
    return MergeResult(Path("out"), ("a", "b"), (1.0, 3.0), "mean", "us/llama", modules, ("[mind] this",))


def printed(result: MergeResult, *, explain: bool = False, width: int = 120, terminal: bool = False) -> str:
    console = Console(file=StringIO(), width=width, force_terminal=terminal, color_system=None)
    print_merge(console, result, explain=explain)
    return console.file.getvalue()  # type: ignore[attr-defined]


def inspected(width: int, *, terminal: bool) -> str:
    names = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.experts.0.down_proj")
    modules = tuple(
        ModuleSpectrum(f"model.layers.{layer}.{name}", (4096, 14336), 64, 25.2, tuple(1.0 + layer for _ in range(64)))
        for layer in range(12)
        for name in names
    )
    console = Console(file=StringIO(), width=width, force_terminal=terminal, color_system=None)
    print_inspection(console, Inspection("folder", "us/llama", modules), every_module=True)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_few_modules_are_shown_one_by_one() -> None:
    text = printed(result_of(2))
    assert "model.layers.1.self_attn.v_proj" in text
    assert "2 + 4" in text and "98.90 %" in text and "≤ 1e-07" in text
    assert "Note: [mind] this" in text
    assert "Wrote out: mean of 2 adapters (weights 1, 3) for us/llama" in text
    assert "qr" not in text


def test_many_modules_are_shown_by_kind_with_the_worst_below() -> None:
    text = printed(result_of(30))
    assert "self_attn.q_proj  (30)" in text and "all  (60)" in text
    assert "1–2" in text and "2–4" in text
    assert "model.layers.29.self_attn.q_proj at rank 4: 96.10 %" in text
    assert "model.layers.3.self_attn.q_proj" not in text


@pytest.mark.parametrize("width", [80, 60, 40])
def test_a_narrow_terminal_still_tells_modules_apart(width: int) -> None:
    for text in (printed(result_of(12), width=width, terminal=True), inspected(width, terminal=True)):
        rows = [line for line in text.splitlines() if line.startswith(("│", "┃", "┏", "└"))]
        assert max(len(row) for row in rows) <= width
    rows = [
        line.split("│")[1].strip().replace("…", "")
        for line in printed(result_of(12), width=width, terminal=True).splitlines()
        if line.startswith("│") and "_proj" in line
    ]
    assert len(set(rows)) == 24
    assert all(
        f"{layer}.self_attn.{name}" in rows[2 * layer + place]
        for layer in range(12)
        for place, name in enumerate(("q_proj", "v_proj"))
    )
    text = printed(result_of(30), width=width, terminal=True)
    assert "attn.q_proj  (30)" in text and "96.10 %" in text and "energy" in text
    text = printed(result_of(12), width=width, terminal=True, explain=True)
    assert "1.self_attn.q_proj" in text.split("why")[1]
    text = inspected(width, terminal=True)
    assert "attn.q_proj  (12)" in text and "attn.k_proj  (12)" in text and "25.0 %" in text
    assert "25.2" in text or width == 40
    assert all(f"{layer}.mlp.experts.0.down_proj" in text for layer in range(12))


@pytest.mark.parametrize("width", [80, 40])
def test_what_is_no_terminal_gets_everything_in_one_line_each(width: int) -> None:
    modules = tuple(replace(module, path=f"{module.path}.{'deep.' * 40}end") for module in result_of(3).modules)
    text = printed(replace(result_of(3), modules=modules, notes=("n" * 200,)), width=width, explain=True)
    lines = text.splitlines()
    for module in modules:
        assert sum(module.path in line and "99.00 %" in line for line in lines) == (".0." in module.path)
        assert sum(module.path in line and "total rank 6 is small" in line for line in lines) == 1
    assert all(header in text for header in ("adapters", "energy kept", "over best", "best possible"))
    assert f"Note: {'n' * 200}" in lines
    assert inspected(width, terminal=False) == inspected(200, terminal=False)
    assert "model.layers.11.mlp.experts.0.down_proj" in inspected(width, terminal=False)


def test_a_wide_terminal_leaves_nothing_out() -> None:
    assert printed(result_of(3), width=150, terminal=True) == printed(result_of(3), width=150)
    assert inspected(150, terminal=True) == inspected(150, terminal=False)


def test_names_that_look_like_markup_are_printed_as_they_are() -> None:
    modules = tuple(replace(module, path=f"{module.path}[/x]") for module in result_of(30).modules)
    assert "q_proj[/x] at rank 4" in printed(replace(result_of(30), modules=modules), explain=True)


def test_explaining_names_the_method_and_the_reason_of_every_module() -> None:
    text = printed(result_of(30), explain=True)
    assert text.count("total rank 6 is small") == 60
    assert "best possible" in text


@pytest.mark.parametrize("excess", [0.0, 1e-12, 3e-7, 0.02])
def test_the_distance_from_the_best_is_always_readable(excess: float) -> None:
    module = MergedModule("layer", (8, 4), (2,), 2, 1.0, Certificate("qr", "why", 2.0, 0.1, excess=excess), 2)
    text = printed(MergeResult(Path("out"), ("a",), (1.0,), "mean", None, (module,), ()))
    assert "an unnamed base model" in text
    assert ("best" if excess == 0 else "≤ ") in text


def test_an_adapter_is_shown_by_kind_and_by_layer() -> None:
    modules = tuple(ModuleSpectrum(f"h.{layer}.attn", (9, 9), 3, 2.5, (2.0 + layer, 1.0, 0.001)) for layer in range(3))
    console = Console(file=StringIO(), width=100)
    print_inspection(console, Inspection("folder", "us/gpt", modules), every_module=True)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "folder: 3 modules for us/gpt, norm of the change 5.657" in text
    assert "attn  (3)" in text and "h.2.attn" in text
    assert text.count("█" * 10) >= 2


def test_bars_and_sparks_have_their_proportions() -> None:
    assert len(bar(1.0, {"a": 1.0, "b": 0.5})) == 10
    assert len(bar(0.5, {"a": 1.0, "b": 0.5})) == 5
    assert bar(0.0, {"a": 0.0}) == ""
    module = ModuleSpectrum("layer", (9, 9), 3, 1.0, (1.0, 0.01, 1e-9))
    assert spark([module]) == "█▄ "
    assert len(spark([ModuleSpectrum("layer", (99, 99), 64, 1.0, (1.0,) * 64)])) == 12
    assert spark([ModuleSpectrum("layer", (9, 9), 2, 0.0, ())]) == ""


def test_progress_is_silent_where_there_is_no_terminal() -> None:
    console = Console(file=StringIO())
    with module_progress(console, "merging", hidden=False) as progress:
        progress(1, 2)
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]
    console = Console(file=StringIO(), force_terminal=True, width=100)
    with module_progress(console, "merging", hidden=False) as progress:
        progress(1, 2)
        progress(2, 2)
    assert "merging" in console.file.getvalue()  # type: ignore[attr-defined]
