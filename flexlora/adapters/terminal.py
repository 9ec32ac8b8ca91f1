"""Shows a merge or an adapter in the terminal: progress, tables and small bars."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise, takewhile
from math import log10

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.progress import MofNCompleteColumn
from rich.table import Table
from rich.text import Text

from flexlora.adapters.inspection import Inspection, ModuleSpectrum, kind_of, mean_spectrum
from flexlora.adapters.merge_result import MergedModule, MergeResult
from flexlora.progress import moving_bar
from flexlora.text import count_text, number_text, percent_text, printable

MOST_ROWS = 40
"""Modules shown one by one; more are shown by kind, with the worst ones below."""


NUM_WORST = 5


LEAST_NAME = 20
"""Letters of a name that a narrow terminal shows at least, leaving out other columns to make room."""


SENTENCE = 12
"""Width at which sentences are broken in a narrow terminal."""


ENDLESS = 1_000_000
"""Width where the output is no terminal."""


UNNAMED = "an unnamed base model"


BAR_CELLS = 10


SPARK_CELLS = 12


SPARK_DECADES = 4.0
"""A spark line is empty where singular values fall below the largest by this many powers of ten."""


_EIGHTHS = " ▏▎▍▌▋▊▉█"


ESTIMATED_FROM = 1e-4
"""Uncertainty of a share of energy from which on it is shown as an estimate."""


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
    shown = _by_kind(result.modules) if many else ((module.path, [module]) for module in result.modules)
    rows = [_merge_cells(name, modules) for name, modules in shown]
    rows.append([f"all  ({len(result.modules)})", *[""] * 4, _kept_text(result.modules), ""])
    headers = ("module", "shape", "adapters", "ranks", "rank", "energy kept", "over best")
    _print_table(console, headers, rows, spare=("adapters", "shape", "ranks", "over best", "rank"), with_total=True)
    if many:
        console.print(f"[bold]Least energy kept[/] in {count_text(len(result.modules), 'module')}:")
        for module in sorted(result.modules, key=lambda module: module.energy_kept)[:NUM_WORST]:
            line = f"  {module.path} at rank {module.rank}: {_kept_text([module])}"
            console.print(printable(line), highlight=False, markup=False, soft_wrap=True)
    if explain:
        _print_methods(console, result.modules)
    for note in result.notes:
        console.print(f"Note: {printable(note)}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    weights = ", ".join(f"{weight:g}" for weight in result.weights[:8]) + (", …" if len(result.weights) > 8 else "")
    console.print(
        f"Wrote {result.folder}: {result.method} of {count_text(len(result.adapters), 'adapter')} "
        f"(weights {weights}) for {printable(result.base_model or UNNAMED)}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _merge_cells(name: str, modules: Sequence[MergedModule]) -> list[str]:
    shapes = sorted({f"{module.shape[0]}x{module.shape[1]}" for module in modules})
    count = f"  ({len(modules)})" if len(modules) > 1 else ""
    return [
        f"{name}{count}",
        shapes[0] if len(shapes) == 1 else f"{len(shapes)} shapes",
        _range_text(len(module.ranks) for module in modules),
        _ranks_text({module.ranks for module in modules}),
        _range_text(module.rank for module in modules),
        _kept_text(modules),
        _excess_text(max(module.certificate.excess for module in modules)),
    ]


def _kept_text(modules: Sequence[MergedModule]) -> str:
    """Return the share of the energy of all modules that is kept, with as many digits as are known."""
    energy = sum(module.energy for module in modules)
    kept = sum(module.energy * module.energy_kept for module in modules) / energy if energy > 0 else 1.0
    least = sum(module.energy * module.certificate.least_energy_kept for module in modules)
    is_known = energy == 0 or kept - least / energy < ESTIMATED_FROM
    return percent_text(kept, 2) if is_known else f"≈ {percent_text(kept, 0)}"


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
    rows = []
    for module in modules:
        found = module.certificate
        numbers = (f"{found.norm:.4g}", f"{found.error:.3g}", f"{found.optimal:.3g}")
        rows.append([module.path, found.method, found.reason, *numbers])
    _print_table(
        console,
        ("module", "method", "why", "norm", "error", "best possible"),
        rows,
        spare=("best possible", "norm", "error", "method"),
        sentences="why",
        left=("why",),
    )


def print_inspection(console: Console, found: Inspection, *, every_module: bool) -> None:
    """Print the spectra by kind of module, the energy by layer and, where asked, every module."""
    console.print(
        f"{found.folder}: {count_text(len(found.modules), 'module')} for {found.base_model or UNNAMED}, "
        f"norm of the change {found.energy**0.5:.4g}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    shares = {kind: found.share(modules) for kind, modules in found.kinds.items()}
    _print_table(
        console,
        ("kind of module", "rank", "effective", "90 %", "99 %", "energy", "", "spectrum"),
        [
            [
                f"{kind}  ({len(modules)})",
                *_rank_cells(modules),
                percent_text(shares[kind]),
                bar(shares[kind], shares),
                spark(modules),
            ]
            for kind, modules in found.kinds.items()
        ],
        spare=("", "99 %", "spectrum", "90 %", "effective"),
        left=("", "spectrum"),
        caption="effective: effective rank; 90 %, 99 %: directions that hold that share of the energy",
    )
    if len(found.layers) > 1:
        by_layer = {str(layer): found.share(modules) for layer, modules in found.layers.items()}
        rows = [[layer, percent_text(share), bar(share, by_layer)] for layer, share in by_layer.items()]
        _print_table(console, ("layer", "energy", ""), rows, left=("",))
    if every_module:
        rows = []
        for module in found.modules:
            shape = f"{module.shape[0]}x{module.shape[1]}"
            rows.append([module.path, shape, *_rank_cells([module]), f"{module.energy**0.5:.4g}", spark([module])])
        headers = ("module", "shape", "rank", "effective", "90 %", "99 %", "norm", "spectrum")
        spare = ("shape", "99 %", "spectrum", "90 %", "effective", "norm")
        _print_table(console, headers, rows, spare=spare, left=("spectrum",))


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


def _print_table(
    console: Console,
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    spare: Sequence[str] = (),
    sentences: str = "",
    left: Sequence[str] = (),
    with_total: bool = False,
    caption: str | None = None,
) -> None:
    """Print a table of named rows, whole; only in a narrow terminal are columns left out and names shortened.

    Args:
        headers: Of the names and of every further column.
        spare: Columns that a narrow terminal does without, the first of them first.
        sentences: Column whose cells may be broken between words.
        left: Columns aligned to the left.
        with_total: Whether the last row sums up the others.
    """
    first, names = headers[0], [row[0] for row in rows]
    columns = {header: [row[place] for row in rows] for place, header in enumerate(headers)}
    natural = {header: _width([header, *cells]) for header, cells in columns.items()}
    # Headers are broken between words in any column.
    least = {header: _width([*header.split(), *cells]) for header, cells in columns.items()}
    least[first] = min(natural[first], _telling_width(names))
    if sentences:
        least[sentences] = min(natural[sentences], SENTENCE)
    room = (console.width if console.is_terminal else ENDLESS) - 1
    for header in spare:
        if sum(width + 3 for width in least.values()) > room:
            del least[header]
    room -= sum(width + 3 for width in least.values())
    if room < 0:
        least[first] = max(1, least[first] + room)
    for header in sorted(least, key=lambda header: header != sentences):
        more = min(natural[header] - least[header], max(0, room))
        least[header], room = least[header] + more, room - more
    whole_width = 1 + sum(width + 3 for width in least.values())
    table = Table(header_style="bold", width=whole_width, caption=caption, caption_justify="left")
    for header, width in least.items():
        table.add_column(header, width=width, justify="left" if header in (first, *left) else "right")
    for place, name in enumerate(names):
        is_total = with_total and place == len(names) - 1
        cells = (Text(columns[header][place]) for header in least if header != first)
        table.add_row(Text(_end_of(name, least[first])), *cells, style="bold" if is_total else "")
    console.print(table, crop=False)


def _width(texts: Iterable[str]) -> int:
    """Return the columns that the widest of ``texts`` takes, at least 1."""
    return max((1, *(cell_len(text) for text in texts)))


def _telling_width(names: Sequence[str]) -> int:
    """Return the least width at which names can be told apart by their ends."""
    least = LEAST_NAME
    for one, other in pairwise(sorted(name[::-1] for name in names)):
        shared = sum(1 for _ in takewhile(lambda letters: letters[0] == letters[1], zip(one, other, strict=False)))
        # The first letter that differs, and a mark for what is missing.
        least = max(least, shared + 2)
    return least


def _end_of(name: str, most: int) -> str:
    """Return the end of a name that is too long; it tells modules apart better than the beginning."""
    return name if cell_len(name) <= most else f"…{set_cell_size(name[::-1], most - 1)[::-1]}"
