"""Merges LoRA adapters of any ranks into one, as the best approximation of the sum of their changes.

For every module the change is ``P = sum_i c_i s_i B_i A_i`` over the adapters that have it, found as one decomposition
of the sum and never by adding factors. The coefficients ``c_i`` are the method: ``mean`` divides the weights by their
sum, ``sum`` takes them as they are. Modules are merged one after another: the factors of one are mapped from the files,
added up, decomposed and written before the next is read, so memory depends neither on the number of adapters nor
on the number of modules.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from flexlora.adapters.coefficients import COEFFICIENTS, Missing
from flexlora.adapters.copies import common_copy, copied_paths, copy_key
from flexlora.adapters.folder import AdapterFolder
from flexlora.adapters.merge_request import (
    MergeRequest,
    RankRule,
    check_request,
    existing_parent,
    names_of,
    weights_of,
)
from flexlora.adapters.merge_result import MergedModule, MergeResult
from flexlora.adapters.merged_folder import SpooledModule, card_of, cast_factor, config_of, spool_dtype, write_merged
from flexlora.adapters.peft_format import factor_keys
from flexlora.adapters.rank_layout import RankLayout, Ranks, common_rank
from flexlora.adapters.tensor_file import TensorSpool
from flexlora.adapters.together import MergeError, check_together, named_base, open_adapters
from flexlora.adapters.write import AdapterDtype
from flexlora.lora.certificate import Accuracy
from flexlora.lora.factors import LoraFactors
from flexlora.lora.product import ProductError, ProductSum, add_product, certified_decomposition
from flexlora.text import count_text, layer_order


def merge(
    adapters: Sequence[str | Path],
    weights: Sequence[float] | None = None,
    *,
    out: str | Path,
    method: str = "mean",
    rank: int | None = None,
    energy: float | None = None,
    exact: bool = False,
    missing: Missing = "zero",
    accuracy: Accuracy = "exact",
    device: str = "cpu",
    dtype: AdapterDtype = "float32",
    allow_different_bases: bool = False,
    ranks: Ranks = "uniform",
    pad_to: int | None = None,
    notify: Callable[[int, int], None] | None = None,
) -> MergeResult:
    """Combine LoRA adapters of any ranks into one PEFT folder, as the best approximation of the sum of their changes.

    With neither ``rank`` nor ``energy`` nor ``exact``, a module gets the largest rank that an adapter has there. A
    module never gets more directions than the sum has. The folder appears whole or not at all.

    Args:
        adapters: PEFT folders, or ids on the Hugging Face hub where there is no such folder.
        weights: One per adapter; all 1 if None. Positive for ``mean``, which divides them by their sum; not 0 for
            ``sum``, which takes them as they are.
        out: Folder to write; must not exist.
        method: One of ``COEFFICIENTS``.
        rank: Directions to keep in every module, at least 1.
        energy: Share in 0..1 of the squared norm of a module's sum to keep, by as few directions as that takes.
        exact: Keep every direction.
        missing: A module that an adapter lacks counts as unchanged by it (``zero``), or the mean there is over those
            that have it (``renormalise``).
        accuracy: How near the best approximation of its rank the result must be: ``exact`` 1e-6, ``fast`` 1e-3.
        device: Where to compute.
        dtype: Of the factors written.
        allow_different_bases: Take adapters that name different base models; the result names the first.
        ranks: ``uniform`` pads smaller ranks to the largest with directions that change nothing and can be trained;
            ``exact`` writes every module with the directions that it keeps, in ``rank_pattern``.
        pad_to: The one rank to pad to, of those that vLLM makes room for: 1, 8, 16, 32, 64, 128, 256, 320 or 512.
        notify: Called after each module with the number of modules done and that of all.

    Raises:
        MergeError: If the arguments contradict each other or the adapters do not fit together.
        AdapterError: If an adapter cannot be read or holds NaN or infinity.
    """
    names = names_of(adapters)
    numbers, rule, layout = weights_of(weights, len(names)), RankRule(rank, energy, exact), RankLayout(ranks, pad_to)
    request = MergeRequest(
        names, numbers, method, missing, rule, accuracy, device, dtype, allow_different_bases, layout
    )
    check_request(request)
    return _merge_into(Path(out), request, notify)


def _merge_into(folder: Path, request: MergeRequest, notify: Callable[[int, int], None] | None) -> MergeResult:
    parent = existing_parent(folder)
    with ExitStack() as stack:
        opened = open_adapters(request.names, stack)
        notes = check_together(opened, request.allow_different_bases)
        paths = sorted({path for adapter in opened for path in adapter.modules})
        stack.enter_context(_naming(folder))
        spool = stack.enter_context(TensorSpool(parent))
        for path in copied_paths(opened):
            spool.add(copy_key(path, paths), common_copy(opened, path))
        modules: list[MergedModule] = []
        unchanged: Counter[int] = Counter()
        for done, path in enumerate(paths, start=1):
            unchanged.update(place for place, adapter in enumerate(opened) if _is_unchanged(adapter, path))
            modules.append(_merge_module(opened, path, request, spool))
            if notify is not None:
                notify(done, len(paths))
        ranks = request.layout.stored({module.path: module.rank for module in modules})
        embeddings = {path for adapter in opened for path, module in adapter.modules.items() if module.is_embedding}
        spooled = {
            module.path: SpooledModule(module.rank, ranks[module.path], module.path in embeddings) for module in modules
        }
        config, card = config_of(opened, ranks), card_of(opened, request, common_rank(ranks), len(ranks))
        write_merged(folder, spool, config, spooled, request, card)
        base_model = named_base(opened).base_model
        notes += _unchanged_notes(opened, unchanged)
    modules = [replace(module, stored_rank=ranks[module.path]) for module in modules]
    notes += _missing_notes(modules, len(opened), request.missing) + _padding_notes(modules, request.layout)
    modules.sort(key=lambda module: layer_order(module.path))
    return MergeResult(folder, request.names, request.weights, request.method, base_model, tuple(modules), tuple(notes))


def _merge_module(
    opened: Sequence[AdapterFolder], path: str, request: MergeRequest, spool: TensorSpool
) -> MergedModule:
    """Add up the changes of one module, put the factors of the sum into ``spool`` and return what became of it."""
    stored = [adapter.modules[path] for adapter in opened if path in adapter.modules]
    coefficients = COEFFICIENTS[request.method](
        request.weights, [path in adapter.modules for adapter in opened], request.missing
    )
    total = _add_up(opened, coefficients, path)
    merged, factors = _decompose(total, path, tuple(module.rank for module in stored), request)
    keys = factor_keys(path, stored[0].is_embedding)
    for key, factor in zip(keys, (factors.A, factors.B), strict=True):
        spool.add(key, cast_factor(factor, spool_dtype(request), path))
    return merged


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Make errors of the file system in a ``with`` block name ``folder``."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{folder} cannot be written, and nothing of it was: {error.strerror or error}") from error


def _add_up(opened: Sequence[AdapterFolder], coefficients: Sequence[float], path: str) -> ProductSum:
    """Return the sum of the changes of one module, whose factors stay where they are in the files."""
    total: ProductSum | None = None
    for adapter, coefficient in zip(opened, coefficients, strict=True):
        if path in adapter.modules:
            factors = adapter.factors(path)
            total = total or ProductSum(*factors.shape, keep_factors=True)
            total = add_product(total, factors, coefficient)
    assert total is not None
    return total


def _decompose(
    total: ProductSum, path: str, ranks: tuple[int, ...], request: MergeRequest
) -> tuple[MergedModule, LoraFactors]:
    rule, accuracy, device = request.rule, request.accuracy, request.device
    limit = rule.limit(ranks)
    try:
        spectrum, certificate = certified_decomposition(total, limit, accuracy=accuracy, device=device)
        while limit is not None and rule.is_short(spectrum, certificate, limit):
            limit *= 4
            spectrum, certificate = certified_decomposition(
                total, limit, accuracy=accuracy, start=spectrum.Vh, device=device
            )
    except ProductError as error:
        raise MergeError(f"{path}: {error}") from error
    rank = rule.chosen(spectrum, certificate)
    if rank < len(spectrum.S):
        spectrum = spectrum.truncate(rank)
        certificate = replace(certificate, tail=spectrum.tail)
    # Scaling 1 and the singular values shared evenly: both factors are of one size, which low precision asks for.
    factors = spectrum.factors(rank, 1.0, "balanced")
    shape = (total.out_features, total.in_features)
    # Where changes cancel there is nothing but rounding errors to keep.
    energy_kept = certificate.energy_kept if len(spectrum.S) else 1.0
    return MergedModule(path, shape, ranks, rank, energy_kept, certificate, rank), factors


def _is_unchanged(adapter: AdapterFolder, path: str) -> bool:
    """Return whether an adapter has a module and changes nothing there."""
    if path not in adapter.modules:
        return False
    factors = adapter.factors(path)
    return factors.scaling == 0 or not factors.B.any() or not factors.A.any()


def _unchanged_notes(opened: Sequence[AdapterFolder], unchanged: Mapping[int, int]) -> list[str]:
    """Return a note for each adapter that changes nothing in modules that it has, because it counts there too.

    Args:
        opened: The adapters.
        unchanged: Place of an adapter -> the number of these modules.
    """
    notes = []
    for place, count in sorted(unchanged.items()):
        adapter, num_modules = opened[place], len(opened[place].modules)
        where = "anywhere" if count == num_modules else f"in {count} of its {count_text(num_modules, 'module')}"
        notes.append(f"{adapter.name} changes nothing {where} (a factor is zero), and its weight counts all the same")
    return notes


def _missing_notes(modules: Sequence[MergedModule], num_adapters: int, missing: Missing) -> list[str]:
    lacking = sum(len(module.ranks) < num_adapters for module in modules)
    if not lacking:
        return []
    counted = "count as unchanged there" if missing == "zero" else "are left out of the mean there"
    return [f"{lacking} of {len(modules)} modules are missing in some adapters, which {counted}"]


def _padding_notes(modules: Sequence[MergedModule], layout: RankLayout) -> list[str]:
    padded = [module for module in modules if module.rank < module.stored_rank]
    if not padded:
        return []
    rank = max(module.stored_rank for module in padded)
    if layout.ranks == "exact":
        why = "where transformers fuses experts, they need one rank"
    else:
        why = "so that readers without rank_pattern understand them too (--ranks exact keeps their own)"
    of_all = f"{len(padded)} of {count_text(len(modules), 'module')}"
    return [f"{of_all} got directions without effect up to rank {rank}, {why}"]
