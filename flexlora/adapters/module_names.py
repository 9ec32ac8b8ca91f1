"""Refuses adapters that seem to name one weight in two ways: PEFT would load what is written under one of them only.

Which names a class of model or a version of a library gives is an open set, so paths are compared by their structure:

- one is a dotted end of the other (``encoder.layer.0.q`` and ``esm.encoder.layer.0.q``), or what precedes the number of
  their block is the same but for parts in between (``model.layers`` and ``model.language_model.layers``);
- they differ only in parts that are known to change places (``language_model.model`` and ``model.language_model``);
- in one block they hold the same role: ``qkv_proj`` is what ``q_proj``, ``k_proj`` and ``v_proj`` are together, and
  ``attention.wo`` what ``self_attn.o_proj`` is.

No pair is suspected if one adapter has modules under both names: then they are two.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import combinations

from flexlora.adapters.folder import AdapterFolder
from flexlora.adapters.peft_format import MergeError
from flexlora.adapters.weight_roles import could_be_one, role_of

CHANGING_PLACES = frozenset(
    "base_model bert distilbert electra gpt_neox language_model model module roberta transformer".split()
)
"""Parts before the blocks that come, go and change places with the class of a model and the version of transformers."""


MOST_FRONTS = 300
"""Beginnings of paths up to which all pairs of them are compared; an adapter has a few."""


_BLOCK_NUMBER = re.compile(r"(?:^|\.)\d+(?=\.)")


_Name = tuple[str, frozenset[str]]
"""Name of a weight and its roles."""


def check_names(opened: Sequence[AdapterFolder]) -> None:
    """Raise if adapters seem to call one module by two names.

    Raises:
        MergeError: Naming both, and an adapter that has each.
    """
    if len(opened) < 2:
        return
    having: dict[str, AdapterFolder] = {}
    for adapter in opened:
        for path in adapter.modules:
            having.setdefault(path, adapter)
    for one, other in (*_suspected_ends(having), *_suspected_fronts(having), *_suspected_places(having)):
        if _is_alike(having, one, other) and not any(_tells_apart(adapter, one, other) for adapter in opened):
            raise MergeError(
                f"adapters must name modules alike; {one} ({having[one].name}) and {other} ({having[other].name}) look "
                "like one module under two names: load each adapter on its base with current PEFT and transformers and "
                "save it again, or rename the keys of one"
            )
    _check_roles(opened)


def _is_alike(having: Mapping[str, AdapterFolder], one: str, other: str) -> bool:
    """Return whether two paths could be one module: where they end alike, their shapes must be equal."""
    if one.rpartition(".")[2] != other.rpartition(".")[2]:
        return True
    return having[one].modules[one].shape == having[other].modules[other].shape


def _suspected_ends(having: Mapping[str, AdapterFolder]) -> list[tuple[str, str]]:
    """Return pairs of paths of which one is a dotted end of the other."""
    pairs = []
    for path in sorted(having):
        end = path
        while "." in end:
            end = end.partition(".")[2]
            if end in having:
                pairs.append((end, path))
    return pairs


def _suspected_fronts(having: Mapping[str, AdapterFolder]) -> list[tuple[str, str]]:
    """Return pairs of paths whose fronts are the same but for parts in between, ends of one another first.

    Fronts that share the end of a path are compared by such a pair. Where they share none, only a front that is a
    dotted end of the other is suspected, by the first path of each.
    """
    paths: dict[str, dict[str, str]] = defaultdict(dict)
    for path in sorted(having):
        front = _front(path)
        if front != path:
            paths[front][path.removeprefix(front)] = path
    pairs = []
    if len(paths) > MOST_FRONTS:
        return []
    for short, long in combinations(sorted(paths, key=lambda front: (front.count("."), front)), 2):
        if not _is_within(short.split("."), long.split(".")):
            continue
        shared = [end for end in paths[short] if end in paths[long]]
        pairs += [(paths[short][end], paths[long][end]) for end in shared]
        if not shared and long.endswith(f".{short}"):
            pairs.append((next(iter(paths[short].values())), next(iter(paths[long].values()))))
    return pairs


def _is_within(short: Sequence[str], long: Sequence[str]) -> bool:
    """Return whether ``long`` is ``short`` with further parts anywhere but at its end."""
    rest = iter(long)
    return short[-1] == long[-1] and len(short) < len(long) and all(part in rest for part in short)


def _suspected_places(having: Mapping[str, AdapterFolder]) -> list[tuple[str, str]]:
    """Return pairs of paths that are the same but for parts that change places."""
    alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for path in sorted(having):
        front = _front(path)
        kept = tuple(part for part in front.split(".") if part not in CHANGING_PLACES)
        alike[(*kept, path.removeprefix(front))].append(path)
    return [pair for paths in alike.values() for pair in combinations(paths, 2)]


@lru_cache(maxsize=1 << 16)  # adapters of one run share modules
def _front(path: str) -> str:
    """Return what comes before the number of the block a module is in, the whole path outside blocks."""
    match = _BLOCK_NUMBER.search(path)
    return path[: match.start()] if match else path


def _tells_apart(adapter: AdapterFolder, one: str, other: str) -> bool:
    """Return whether an adapter has modules under both names, or under both of what precedes the blocks in them."""
    fronts = {_front(one), _front(other)}
    if len(fronts) == 1 or fronts & {one, other}:
        return one in adapter.modules and other in adapter.modules
    return fronts <= {_front(path) for path in adapter.modules}


def _check_roles(opened: Sequence[AdapterFolder]) -> None:
    """Raise if in one block weights of two names have one role, and no adapter has both names in a block."""
    blocks: dict[tuple[str, str], dict[_Name, tuple[str, AdapterFolder]]] = defaultdict(dict)
    together: set[frozenset[_Name]] = set()
    for adapter in opened:
        own: dict[tuple[str, str], set[_Name]] = defaultdict(set)
        for path in adapter.modules:
            role = role_of(path)
            if role.roles:
                place, name = (role.block, role.copy), (role.name, role.roles)
                own[place].add(name)
                blocks[place].setdefault(name, (path, adapter))
        together.update(frozenset(pair) for names in own.values() for pair in combinations(names, 2))
    for found in blocks.values():
        # Sets of roles have no order.
        for one, other in combinations(sorted(found, key=lambda name: found[name][0]), 2):
            (path, adapter), (other_path, other_adapter) = found[one], found[other]
            if (
                one[0] != other[0]
                and one[1] & other[1]
                and frozenset((one, other)) not in together
                and could_be_one(adapter.modules[path], other_adapter.modules[other_path])
            ):
                raise MergeError(
                    f"adapters must name weights alike; {path} ({adapter.name}) and {other_path} "
                    f"({other_adapter.name}) hold one weight of a block under two names, which no model has both of: "
                    "train or convert both for one layout of the base model"
                )
