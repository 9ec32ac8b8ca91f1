"""Describes a method to the rest of the package: its options, and its traits.

Loads no torch, so that a configuration is checked before anything heavy is imported.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from flexlora.errors import FlexLoraError

RULES = ("gt", "ge", "lt", "le", "min_length", "max_length", "pattern")


class OptionError(FlexLoraError, ValueError):
    """Options of a method that contradict each other; raised in its ``__post_init__``, naming both and the fix."""


@dataclass(frozen=True)
class Traits:
    """What others must know of a method; nothing outside its file asks for it by name.

    A method has a class attribute ``traits``, or a property where they depend on its options; one without has these
    defaults.

    Attributes:
        needs_one_rank: In every module, all clients must have the same rank.
        adds_changes: The state is a sum to which late changes can be added; the method has ``add_changes``.
        linear_in_products: A round's result depends on the updates only through the weighted sum of ``s_i B_i A_i`` and
            on ranks: it is the same for ``(B M, M^-1 A)``, and works on sums that hide the single update.
        folds_tail: Clients also receive what their rank cannot hold, as a frozen branch.
        folds_into_base: The frozen branch stands for what the method adds to the base weights: it is part of every
            model, whatever its rank, and has no bound but the shorter side of a module.
        server_rank: Rank of the global adapter in every module; None is the largest of any client.
        per_client: Every client of a round gets a broadcast of its own; the method has ``broadcast_to``. ``broadcast``
            stays what a model of these ranks is scored with and exported as.
        personal: What clients keep between rounds (``Broadcast.kept``) is part of their models; there is no global
            model beyond ``broadcast``.
        local_optimizer: The optimiser of the clients that the method prescribes; None leaves it to the configuration.
        fewer_directions: Broadcasts may have lower ranks than asked for.
        keeps_directions: If clients return what they were sent, the change of the trainable part stays as it is. False
            where that holds of the whole model only, trainable and frozen together, or not at all.
        server_optimizer: A round is a step of a server optimiser (a learning rate other than 1, momentum): what one
            client sends is not what it gets back.
        counts_examples: An update counts in proportion to its weight. False where the method has weights of its own;
            only whether a weight is 0 matters then.
        sends_both_factors: Both factors of all trained directions travel, each round and each way. False where one is
            known, kept or left as it was, or where cores or chosen entries travel in their place.
        least_rounds: Rounds without which a method never comes to what it is for, because its first ones prepare it.
        secure_sums: What of a cohort must be added up, where nobody may see the single update, for the method to work
            as it does with all of them: its ``factors``, direction by direction, or its ``products``; the method has
            ``aggregate_sum``. None cannot do without the single update.
        private_changes: What a client's change is measured in where it is clipped for differential privacy: its
            ``products`` or its ``factors`` (``flexlora.lora.change``); the method has ``add_noisy_changes``. None where
            what one client does to the state has no bound.
        takes_own_training: Clients can be trained by a function that knows factors alone. False where they train cores
            or chosen entries, or where the method adds a penalty to their loss.
    """

    needs_one_rank: bool = False
    adds_changes: bool = False
    linear_in_products: bool = False
    folds_tail: bool = False
    folds_into_base: bool = False
    server_rank: int | None = None
    per_client: bool = False
    personal: bool = False
    local_optimizer: Literal["sgd"] | None = None
    fewer_directions: bool = False
    keeps_directions: bool = True
    server_optimizer: bool = False
    counts_examples: bool = True
    sends_both_factors: bool = True
    takes_own_training: bool = True
    least_rounds: int = 1
    secure_sums: Literal["factors", "products"] | None = None
    private_changes: Literal["products", "factors"] | None = None


@dataclass(frozen=True)
class Option:
    """One setting of a method.

    Attributes:
        annotation: Its type.
        default: Its value where a configuration says nothing.
        description: What it does, for help and documentation.
        rules: Bounds by pydantic's names, such as ``ge``.
    """

    annotation: Any
    default: Any
    description: str
    rules: Mapping[str, Any]


def option(default: Any, description: str, **rules: Any) -> Any:
    """Return a dataclass field that a configuration can set as ``method.NAME``.

    Args:
        default: Value where the configuration says nothing; every option has one.
        description: What it does, with its unit: the help text.
        rules: Bounds: ``gt``, ``ge``, ``lt``, ``le``, ``min_length``, ``max_length``, ``pattern``.

    Raises:
        TypeError: For a rule of another name.
    """
    unknown = sorted(rules.keys() - set(RULES))
    if unknown:
        raise TypeError(f"rules of an option must be among {', '.join(RULES)}; got {', '.join(unknown)}")
    return dataclasses.field(default=default, metadata={"description": description, "rules": rules})


def options_of(method: type[Any]) -> dict[str, Option]:
    """Return the options of a method: every field of its dataclass but ``scaling``.

    Raises:
        TypeError: If the class is no dataclass, has no ``scaling``, or a field of it cannot be an option.
    """
    name = method.__name__
    if not dataclasses.is_dataclass(method):
        raise TypeError(f"{name} must be a dataclass: write @dataclass(frozen=True) above the class")
    hints = get_type_hints(method, include_extras=True)
    options: dict[str, Option] = {}
    fields = dataclasses.fields(method)
    if "scaling" not in {field.name for field in fields if field.init}:
        raise TypeError(f"{name} needs a field for the scaling rule: write scaling: Scaling above its options")
    for field in fields:
        if field.name == "scaling" or not field.init:
            continue
        if field.name == "traits":
            raise TypeError(f"{name}.traits has a type, which makes it an option: write traits = Traits(...) alone")
        if field.name.startswith("_"):
            raise TypeError(f"{name}.{field.name} must not begin with an underscore: it would be an option")
        if field.default is dataclasses.MISSING:
            raise TypeError(f"{name}.{field.name} needs a default: write option(DEFAULT, DESCRIPTION)")
        description, rules = field.metadata.get("description", ""), field.metadata.get("rules", {})
        options[field.name] = Option(hints[field.name], field.default, description, rules)
    return options


def traits_of(method: object) -> Traits:
    """Return the traits of a method or its class, the defaults for one that names none."""
    traits = getattr(method, "traits", Traits())
    if not isinstance(traits, Traits):
        raise TypeError(f"traits of a method must be a Traits object; got {type(traits).__name__}")
    return traits
