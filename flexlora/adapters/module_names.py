"""Refuses adapters that seem to name one weight in two ways: PEFT would load what is written under one of them only.

Which names a class of model or a version of a library gives is an open set, so paths are compared by their structure:

- one is a dotted end of the other (``encoder.layer.0.q`` and ``esm.encoder.layer.0.q``), or what precedes the number of
  their block is the same but for parts in between (``model.layers`` and ``model.language_model.layers``);
- they differ only in parts that are known to change places (``language_model.model`` and ``model.language_model``);
- in one block they hold the same role: ``qkv_proj`` is what ``q_proj``, ``k_proj`` and ``v_proj`` are together.

No pair is suspected if one adapter has modules under both names: then they are two.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import combinations

from flexlora.adapters.folder import AdapterFolder
from flexlora.adapters.peft_format import MergeError

CHANGING_PLACES = frozenset(
    "base_model bert distilbert electra gpt_neox language_model model module roberta transformer".split()
)
"""Parts before the blocks that come, go and change places with the class of a model and the version of transformers."""


ROLES: Mapping[str, frozenset[str]] = {
    name: frozenset(roles.split())
    for roles, names in {
        "q": "q_proj q_lin query wq q to_q",
        "k": "k_proj k_lin key wk k to_k",
        "v": "v_proj v_lin value wv v to_v",
        "k v": "kv_proj wkv key_value kv to_kv",
        "q k v": "qkv_proj qkv query_key_value Wqkv wqkv W_pack c_attn to_qkv qkv_lin att_proj",
        "gate": "gate_proj w1 wi_0",
        "up": "up_proj w3 wi_1",
        "gate up": "gate_up_proj w13 gate_up wi",
    }.items()
    for name in names.split()
}
"""Last part of a path -> the roles in its block that the weight of that name has, all models taken together."""


_FUSED = (
    (re.compile("qkv|query_?key_?value"), frozenset("qkv")),
    (re.compile("gate_?up|up_?gate"), frozenset({"gate", "up"})),
)
"""Pattern of names that are no key of ``ROLES`` -> their roles."""


MOST_FRONTS = 300
"""Beginnings of paths up to which all pairs of them are compared; an adapter has a few."""


_BLOCK_NUMBER = re.compile(r"(?:^|\.)\d+(?=\.)")


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
    blocks: dict[str, dict[str, tuple[str, AdapterFolder]]] = defaultdict(dict)
    together: set[frozenset[str]] = set()
    for adapter in opened:
        own: dict[str, set[str]] = defaultdict(set)
        for path in adapter.modules:
            block, name = _place(path)
            if roles_of(name):
                own[block].add(name)
                blocks[block].setdefault(name, (path, adapter))
        together.update(frozenset(pair) for names in own.values() for pair in combinations(sorted(names), 2))
    for found in blocks.values():
        for one, other in combinations(sorted(found), 2):
            if roles_of(one) & roles_of(other) and frozenset((one, other)) not in together:
                (path, adapter), (other_path, other_adapter) = found[one], found[other]
                raise MergeError(
                    f"adapters must name weights alike; {path} ({adapter.name}) and {other_path} "
                    f"({other_adapter.name}) hold one weight of a block under two names, which no model has both of: "
                    "train or convert both for one layout of the base model"
                )


@lru_cache(maxsize=1 << 12)
def roles_of(name: str) -> frozenset[str]:
    """Return the roles in its block of a weight with this last part of a path; none where it is not known."""
    if name in ROLES:
        return ROLES[name]
    return next((roles for pattern, roles in _FUSED if pattern.search(name.lower())), frozenset())


def _place(path: str) -> tuple[str, str]:
    """Return the block of a module, in which experts are blocks of their own, and the last part of its path."""
    before, _, name = path.rpartition(".")
    match = re.match(r"(.*(?:^|\.)\d+)(?=\.|$)", before)
    return (match[1] if match else before), name
