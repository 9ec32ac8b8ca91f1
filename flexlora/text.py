"""Writes numbers, sizes, durations, ranks and names as text for people."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

NONE = "–"

_PLAIN_WORD = re.compile(r"\w[\w.@+-]{0,99}")


_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}
_BUT_LINE_BREAKS = {code: text for code, text in _CONTROLS.items() if code != ord("\n")}


def printable(text: str, *, keep_lines: bool = False) -> str:
    """Return a text with its control characters (C0, DEL and C1) written as ``\\x1b``.

    A terminal takes these as commands: names from files of others must not reach one as they are.

    Args:
        text: What will be shown.
        keep_lines: Leave line breaks as they are, in texts that have some of their own.
    """
    return text.translate(_BUT_LINE_BREAKS if keep_lines else _CONTROLS)


def is_plain_word(text: str) -> bool:
    """Return whether a text can be the name of a file anywhere: one word of at most 100 characters."""
    return _PLAIN_WORD.fullmatch(text) is not None


def describe_ranks(ranks: Mapping[str, int]) -> str:
    """Return ranks in a few words: ``8 in every module``, ``30 (q, k, v, o), 200 (gate, up, down)``."""
    if not ranks:
        return "no modules"
    if len(set(ranks.values())) == 1:
        return f"{next(iter(ranks.values()))} in every module"
    by_leaf: defaultdict[str, set[int]] = defaultdict(set)
    for module, rank in ranks.items():
        by_leaf[module.rsplit(".", 1)[-1].removesuffix("_proj")].add(rank)
    by_rank: defaultdict[tuple[int, int], list[str]] = defaultdict(list)
    for leaf, leaf_ranks in sorted(by_leaf.items(), key=lambda item: _leaf_order(item[0])):
        by_rank[min(leaf_ranks), max(leaf_ranks)].append(leaf)
    return ", ".join(
        f"{low if low == high else f'{low}–{high}'} ({', '.join(leaves)})"
        for (low, high), leaves in sorted(by_rank.items())
    )


def layer_order(module: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sort key: layer 2 before layer 10, and within a layer q, k, v, o, gate, up, down."""
    *parents, leaf = module.split(".")
    blocks = [(0, int(part), "") for part in parents if part.isdigit()]
    return (*blocks, (1, *_leaf_order(leaf)), (2, 0, module))


def short_names(modules: Sequence[str]) -> list[str]:
    """Return module paths without the parts that they all share or that say little: ``0.q``, ``11.down``."""
    parts = [module.split(".") for module in modules]
    if len(modules) < 2:
        return [part[-1] for part in parts]
    shared = {
        place
        for place in range(min(len(part) for part in parts))
        if all(part[place] == parts[0][place] for part in parts)
    }
    kept = [[word for place, word in enumerate(part) if place not in shared] or part for part in parts]
    brief = [".".join(word.removesuffix("_proj") for word in part if word not in {"self_attn", "mlp"}) for part in kept]
    return brief if len(set(brief)) == len(brief) else [".".join(part) for part in kept]


def number_text(value: float | None, digits: int = 1, unit: str = "") -> str:
    """Return a number with a fixed number of decimals and thin spaces between thousands; a dash for none."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:,.{digits}f}{unit}".replace(",", "\u202f").replace("-", "\u2212")


def signed_text(value: float | None, digits: int = 1, unit: str = "") -> str:
    """Return a difference with its sign, zero without one."""
    if value is None or not math.isfinite(value):
        return NONE
    text = f"{value:+,.{digits}f}".replace(",", "\u202f").replace("-", "\u2212")
    return (text if text.strip("+\u22120.") else text[1:]) + unit


def percent_text(share: float | None, digits: int = 1) -> str:
    """Return a share between 0 and 1 in percent."""
    return number_text(None if share is None else 100 * share, digits, " %")


def bytes_text(size: float | None) -> str:
    """Return a size in the decimal unit that leaves one to three digits before the point."""
    if size is None or not math.isfinite(size):
        return NONE
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 99.95 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB".replace(",", "\u202f")


def seconds_text(seconds: float | None) -> str:
    """Return a duration in its two largest units: ``2 h 05 min``."""
    if seconds is None or not math.isfinite(seconds):
        return NONE
    if seconds < 0.9995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def count_text(count: int, noun: str) -> str:
    """Return a count with its noun: ``1 client``, ``80 clients``."""
    return f"{number_text(count, 0)} {noun}" + ("" if count == 1 else "s")


def _leaf_order(leaf: str) -> tuple[int, str]:
    order = ("q", "k", "v", "o", "gate", "up", "down")
    leaf = leaf.removesuffix("_proj")
    return (order.index(leaf) if leaf in order else len(order), leaf)
