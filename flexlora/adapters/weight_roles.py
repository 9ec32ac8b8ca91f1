"""Says what a weight does in its block, whatever its model calls it.

``qkv_proj`` is what ``q_proj``, ``k_proj`` and ``v_proj`` are together, and ``attention.wo`` what ``self_attn.o_proj``
is. Some names say it alone; ``dense``, ``c_proj`` and ``wo`` only together with the part that they are in.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from flexlora.adapters.stored_modules import StoredModule


def _roles(table: Mapping[str, str]) -> dict[str, frozenset[str]]:
    """Return name -> roles, from roles -> names."""
    return {name: frozenset(roles.split()) for roles, names in table.items() for name in names.split()}


_ANYWHERE = _roles(
    {
        "q": "q_proj q_lin query wq q to_q linear_q",
        "k": "k_proj k_lin key wk k to_k linear_k",
        "v": "v_proj v_lin value wv v to_v linear_v",
        "q k": "qk_proj qk to_qk wqk",
        "k v": "kv_proj wkv key_value kv to_kv",
        "q k v": "qkv_proj qkv query_key_value wqkv w_pack c_attn to_qkv qkv_lin att_proj",
        "gate": "gate_proj w1 wi_0 fc1_gate",
        "up": "up_proj w3 wi_1 fc1_up",
        "gate up": "gate_up_proj w13 w12 gate_up wi",
        "down": "down_proj dense_4h_to_h",
    }
)
"""Last part of a path in small letters -> the roles that the weight of that name has, all models taken together."""


_IN_ATTENTION = _roles(
    {
        "q k v": "in_proj",
        "o": "o_proj out_proj wo dense out_lin c_proj to_out linear_out linear_proj proj o out o_lin",
    }
)


_IN_MLP = _roles(
    {
        "up": "fc1 c_fc fc_in lin1 dense",
        "gate up": "dense_h_to_4h linear_fc1",
        "gate": "c_fc_0",
        "down": "w2 c_proj wo fc2 fc_out lin2 out_proj linear_fc2",
    }
)


_IN_NOTHING = _roles({"up": "fc1", "down": "fc2"})
"""Names of layers that stand in their block by themselves."""


_FUSED = (
    (re.compile("qkv|query_?key_?value"), frozenset("qkv")),
    (re.compile("gate_?up|up_?gate"), frozenset({"gate", "up"})),
)
"""Pattern of names that are in no table -> their roles."""


_ATTENTION = re.compile(r"(?:self|cross|encoder)?_?att(?:n|ention)?\d?|encdecattention|enc_attn")


_MLP = re.compile(r"mlp|ffn|ff|feed_?forward|dense(?:gated)?(?:act|relu)dense|swiglu|intermediate")


_OTHER_COPIES = re.compile("cross|encdec|encoder_att|enc_attn|attn2|expert|shared|residual|linear_att|lora")
"""Parts of a block that are a second one of their kind, beside its own attention or MLP."""


_BLOCK = re.compile(r"(.*(?:^|\.)\d+)(?=\.|$)")


@dataclass(frozen=True, slots=True)
class Role:
    """What a weight does, and where.

    Attributes:
        block: It stands in; experts are blocks of their own.
        copy: Which attention or MLP of the block it belongs to, empty for the block's own.
        name: In its model.
        roles: It has, none where they are not known.
    """

    block: str
    copy: str
    name: str
    roles: frozenset[str]


@lru_cache(maxsize=1 << 16)  # adapters of one run share modules
def role_of(path: str) -> Role:
    """Return what the weight of a module does in its block."""
    before, _, name = path.rpartition(".")
    if name.isdigit():  # diffusers has to_out.0
        before, _, name = before.rpartition(".")
    match = _BLOCK.match(before)
    block = match[1] if match else before
    parents = [part.lower() for part in before.removeprefix(block).split(".") if part]
    copies = ".".join(part for part in parents if _OTHER_COPIES.search(part) or not _is_plain(part))
    return Role(block, copies, name, _roles_in(name.lower(), parents))


def _is_plain(part: str) -> bool:
    """Return whether a part of a block is what models call its attention or MLP, or a part of these."""
    return part in ("self", "output") or bool(_ATTENTION.fullmatch(part) or _MLP.fullmatch(part))


def _roles_in(name: str, parents: list[str]) -> frozenset[str]:
    """Return the roles of a name, all in small letters, inside these parts of its block."""
    if name in _ANYWHERE:
        return _ANYWHERE[name]
    found: frozenset[str] | None = None
    if any(_ATTENTION.fullmatch(part) for part in parents):
        # BERT's attention.output.dense is the attention's; attention.output.norm is in no table.
        found = _IN_ATTENTION.get(name)
    elif parents == ["output"]:
        found = frozenset({"down"}) if name == "dense" else None
    elif parents and _MLP.fullmatch(parents[-1]):
        found = _IN_MLP.get(name)
    elif not parents:
        found = _IN_NOTHING.get(name)
    return found or next((roles for pattern, roles in _FUSED if pattern.search(name)), frozenset())


def could_be_one(one: StoredModule, other: StoredModule) -> bool:
    """Return whether the shapes of two weights with a role in common allow that they are one, or parts of one.

    A fused weight has more rows than its parts, and as many columns.
    """
    return one.shape[1] == other.shape[1]
