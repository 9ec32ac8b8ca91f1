"""What the terminal shows of a merge and of an adapter: progress, tables and small bars."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import log10

from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn
from rich.table import Table

from flexlora.inspection import Inspection, ModuleSpectrum, kind_of, mean_spectrum
from flexlora.merging import MergedModule, MergeResult
from flexlora.progress import moving_bar
from flexlora.report.tables import count_text, number_text, percent_text

MOST_ROWS = 40
"""Modules shown one by one; more are shown by kind, with the worst ones below."""
NUM_WORST = 5
WIDE_COLUMNS = 96
UNNAMED = "an unnamed base model"
BAR_CELLS = 10
SPARK_CELLS = 12
SPARK_DECADES = 4.0
"""A spark line is empty where singular values fall below the largest by this many powers of ten."""

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_HEIGHTS = " ▁▂▃▄▅▆▇█"


@contextmanager
def module_progress(console: Console, title: str, *, hidden: bool) -> Iterator[Callable[[int, int], None]]:
    """Give a ``with`` block a function that shows how many modules are done, and of how many."""
    progress = moving_bar(console, MofNCompleteColumn(), hidden=hidden, transient=True)
    task = progress.add_task(title, total=None)
    with progress:
        yield lambda done, total: progress.update(task, completed=done, total=total)


def print_merge(console: Console, result: MergeResult, *, explain: bool) -> None:
    """Print what was kept of every module, or of every kind of module where there are many, and what to know."""
    many = len(result.modules) > MOST_ROWS
    table = _table("module", ("shape", "adapters", "ranks", "rank", "energy kept", "over best"))
    for name, modules in _by_kind(result.modules) if many else ((module.path, [module]) for module in result.modules):
        table.add_row(*_merge_cells(name, modules))
    everything = [f"all  ({len(result.modules)})", *[""] * 4, percent_text(result.energy_kept, 2), ""]
    table.add_row(*everything, style="bold")
    console.print(table)
    if many:
        console.print(f"[bold]Least energy kept[/] in {count_text(len(result.modules), 'module')}:")
        for module in sorted(result.modules, key=lambda module: module.energy_kept)[:NUM_WORST]:
            line = f"  {module.path} at rank {module.rank}: {percent_text(module.energy_kept, 2)}"
            console.print(line, highlight=False, markup=False)
    if explain:
        _print_methods(console, result.modules)
    for note in result.notes:
        console.print(f"Note: {note}", style="yellow", highlight=False, markup=False)
    weights = ", ".join(f"{weight:g}" for weight in result.weights[:8]) + (", …" if len(result.weights) > 8 else "")
    console.print(
        f"Wrote {result.folder}: {result.method} of {count_text(len(result.adapters), 'adapter')} "
        f"(weights {weights}) for {result.base_model or UNNAMED}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _merge_cells(name: str, modules: Sequence[MergedModule]) -> list[str]:
    shapes = sorted({f"{module.shape[0]}x{module.shape[1]}" for module in modules})
    energy = sum(module.energy for module in modules)
    kept = sum(module.energy * module.energy_kept for module in modules) / energy if energy > 0 else 1.0
    count = f"  ({len(modules)})" if len(modules) > 1 else ""
    return [
        f"{escape(name)}{count}",
        shapes[0] if len(shapes) == 1 else f"{len(shapes)} shapes",
        _range_text(len(module.ranks) for module in modules),
        _ranks_text({module.ranks for module in modules}),
        _range_text(module.rank for module in modules),
        percent_text(kept, 2),
        _excess_text(max(module.certificate.excess for module in modules)),
    ]


def _ranks_text(combinations: set[tuple[int, ...]]) -> str:
    """Return the ranks of the adapters: ``4 + 8 + 16`` where that is short and the same everywhere, else the range."""
    one = next(iter(combinations))
    if len(combinations) == 1 and len(one) <= 4:
        return " + ".join(str(rank) for rank in one)
    return _range_text(rank for ranks in combinations for rank in ranks)


def _range_text(values: Iterable[int]) -> str:
    low, high = min(values := list(values)), max(values)
    return str(low) if low == high else f"{low}–{high}"


def _excess_text(excess: float) -> str:
    """Return how much worse than the best approximation of its rank a result can be."""
    return "best" if excess == 0 else f"≤ {excess:.0e}"


def _print_methods(console: Console, modules: Sequence[MergedModule]) -> None:
    table = _table("module", ("method", "why", "norm", "error", "best possible"))
    table.columns[2].justify = "left"
    for module in modules:
        found = module.certificate
        table.add_row(
            escape(module.path),
            found.method,
            found.reason,
            f"{found.norm:.4g}",
            f"{found.error:.3g}",
            f"{found.optimal:.3g}",
        )
    console.print(table)


def print_inspection(console: Console, found: Inspection, *, every_module: bool) -> None:
    """Print the spectra by kind of module, the energy by layer and, where asked, every module."""
    console.print(
        f"{found.folder}: {count_text(len(found.modules), 'module')} for {found.base_model or UNNAMED}, "
        f"norm of the change {found.energy**0.5:.4g}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    with_bars = console.width >= WIDE_COLUMNS
    table = _table("kind of module", ("rank", "effective", "90 %", "99 %", "energy", *([""] * with_bars), "spectrum"))
    shares = {kind: found.share(modules) for kind, modules in found.kinds.items()}
    for kind, modules in found.kinds.items():
        bars = [bar(shares[kind], shares)] if with_bars else []
        cells = [*_rank_cells(modules), percent_text(shares[kind]), *bars, spark(modules)]
        table.add_row(f"{escape(kind)}  ({len(modules)})", *cells)
    for column in table.columns[6:]:
        column.justify = "left"
    table.caption = "effective: effective rank; 90 %, 99 %: directions that hold that share of the energy"
    table.caption_justify = "left"
    console.print(table)
    if len(found.layers) > 1:
        layers = _table("layer", ("energy", ""))
        layers.columns[-1].justify = "left"
        by_layer = {str(layer): found.share(modules) for layer, modules in found.layers.items()}
        for layer, share in by_layer.items():
            layers.add_row(layer, percent_text(share), bar(share, by_layer))
        console.print(layers)
    if every_module:
        rows = _table("module", ("shape", "rank", "effective", "90 %", "99 %", "norm", "spectrum"))
        for module in found.modules:
            shape = f"{module.shape[0]}x{module.shape[1]}"
            norm = f"{module.energy**0.5:.4g}"
            rows.add_row(escape(module.path), shape, *_rank_cells([module]), norm, spark([module]))
        rows.columns[-1].justify = "left"
        console.print(rows)


def _rank_cells(modules: Sequence[ModuleSpectrum]) -> list[str]:
    effective = sum(module.effective_rank for module in modules) / len(modules)
    return [
        _range_text(module.rank for module in modules),
        number_text(effective),
        *(_range_text(module.rank_for(share) for module in modules) for share in (0.9, 0.99)),
    ]


def bar(share: float, shares: Mapping[str, float]) -> str:
    """Return a bar that is ``BAR_CELLS`` cells long for the largest of ``shares``."""
    eighths = round(8 * BAR_CELLS * share / max(max(shares.values()), 1e-300))
    whole, rest = divmod(eighths, 8)
    return ("█" * whole + _EIGHTHS[rest]).rstrip()


def spark(modules: Sequence[ModuleSpectrum]) -> str:
    """Return the mean spectrum as a line of small columns, logarithmic, one per direction or per few directions."""
    values = mean_spectrum(modules)
    cells = min(SPARK_CELLS, len(values))
    heights = []
    for cell in range(cells):
        value = values[cell * len(values) // cells]
        level = 1 + log10(value) / SPARK_DECADES if value > 0 else 0.0
        heights.append(_HEIGHTS[max(0, min(8, round(8 * level)))])
    return "".join(heights)


def _by_kind(modules: Sequence[MergedModule]) -> list[tuple[str, list[MergedModule]]]:
    kinds: dict[str, list[MergedModule]] = {}
    for module in modules:
        kinds.setdefault(kind_of(module.path), []).append(module)
    return list(kinds.items())


def _table(first: str, others: Sequence[str]) -> Table:
    table = Table(header_style="bold")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table
