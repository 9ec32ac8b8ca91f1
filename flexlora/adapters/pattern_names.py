"""Finds the names that the patterns of an adapter were matched with where modules are stored under wrapped names.

PEFT matches ``rank_pattern`` and ``alpha_pattern`` with the names that modules had when they got factors. If the model
was wrapped before (``get_peft_model(torch.compile(model))``), these are the stored names; if it was wrapped afterwards,
they are the names without wrappers. Ranks, ``target_modules`` and patterns that name a wrapper tell which.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from flexlora.adapters.peft_format import CONFIG_FILE, AdapterError
from flexlora.adapters.peft_settings import numbers_of
from flexlora.adapters.stored_names import StoredName, is_wrapper
from flexlora.patterns import PatternError, bounded_pattern

Names = tuple[str, ...]


def looked_up(config: Mapping[str, Any], stored: Mapping[str, StoredName], ranks: Sequence[int], name: str) -> Names:
    """Return the names that patterns were matched with.

    Args:
        config: Of the adapter.
        stored: Module path -> what the key of a factor stands for.
        ranks: Of the stored factors, one per module.
        name: Of the adapter.

    Raises:
        AdapterError: If they give different scalings and nothing tells which PEFT used.
    """
    given = tuple(one.given_path for one in stored.values())
    # Compiled as a whole before and sharded afterwards, the model has kept only what stands in front.
    fronts = tuple(one.front_path for one in stored.values())
    candidates = list(dict.fromkeys((given, fronts, tuple(stored))))
    if len(candidates) == 1:
        return given
    fitting = [names for names in candidates if numbers_of(config, "r", "rank_pattern", names, name) == tuple(ranks)]
    fitting = _kept(fitting, [_are_targets(config, names) for names in fitting])
    fitting = _kept(fitting, [_meet_wrappers(config, names, name) for names in fitting])
    if not fitting:  # every module by itself, as if wrapped at different times
        return _each_by_rank(config, candidates, ranks, name)
    if given == fronts and given in fitting:
        # PEFT's own reading: it matches what it stores, and a whole model is wrapped first.
        return given
    _check_alphas(config, fitting, name)
    return fitting[0]


def _kept(candidates: list[Names], fits: Sequence[bool]) -> list[Names]:
    """Return the candidates that fit, or all of them if none does."""
    return [names for names, fit in zip(candidates, fits, strict=True) if fit] or candidates


def _are_targets(config: Mapping[str, Any], names: Names) -> bool:
    """Return whether ``target_modules`` chooses all of these names."""
    targets = config.get("target_modules")
    if isinstance(targets, list):
        ends = tuple(f".{target}" for target in targets)
        return all(path in targets or path.endswith(ends) for path in names)
    if not isinstance(targets, str) or targets.lower() == "all-linear":
        return True
    try:
        pattern = bounded_pattern(rf"^(?:{targets})$")
    except PatternError:
        return True
    return all(pattern.found_in(path) for path in names)


def _meet_wrappers(config: Mapping[str, Any], names: Names, name: str) -> bool:
    """Return whether every pattern that names a wrapper matches one of these names."""
    patterns = [*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})]
    naming = [
        pattern for pattern in patterns if any(is_wrapper(part) for part in pattern.replace("\\", ".").split("."))
    ]
    return all(any(_matches(pattern, names, name)) for pattern in naming)


def _matches(pattern: str, names: Names, name: str) -> tuple[float, ...]:
    """Return 1 for each name that a pattern matches, else 0."""
    return numbers_of({"lora_alpha": 0, "alpha_pattern": {pattern: 1}}, "lora_alpha", "alpha_pattern", names, name)


def _each_by_rank(config: Mapping[str, Any], candidates: Sequence[Names], ranks: Sequence[int], name: str) -> Names:
    """Return for each module a name that gives its rank, which must not differ in the scaling."""
    found = [numbers_of(config, "r", "rank_pattern", names, name) for names in candidates]
    chosen = []
    for place, rank in enumerate(ranks):
        of_one = [(names[place],) for names, own in zip(candidates, found, strict=True) if own[place] == rank]
        if len(of_one) > 1:
            _check_alphas(config, of_one, name)
        chosen.append(of_one[0][0] if of_one else candidates[-1][place])
    return tuple(chosen)


def _check_alphas(config: Mapping[str, Any], candidates: Sequence[Names], name: str) -> None:
    """Raise if the candidates give different scalings."""
    first = numbers_of(config, "lora_alpha", "alpha_pattern", candidates[0], name)
    for names in candidates[1:]:
        alphas = numbers_of(config, "lora_alpha", "alpha_pattern", names, name)
        differing = [place for place, alpha in enumerate(first) if alpha != alphas[place]]
        if not differing:
            continue
        place = differing[0]
        one, other = candidates[0][place], names[place]
        pattern = next(
            key for key in config["alpha_pattern"] if _matches(key, (one,), name) != _matches(key, (other,), name)
        )
        raise AdapterError(
            f"{name}: alpha_pattern {pattern} in {CONFIG_FILE} must match modules whatever wraps them; lora_alpha is "
            f"{first[place]:g} for {one} as stored and {alphas[place]:g} for {other}, and nothing tells whether the "
            "model was wrapped before it got factors: take the wrappers out of the names of tensors and out of patterns"
        )
