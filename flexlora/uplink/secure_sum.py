"""The client's end of a secure sum of what a cohort trained: numbers in fixed point, masked, nothing else leaves it.

A method says what it needs of a cohort (``Traits.secure_sums``):

- ``factors``: how ``A_i`` and ``s_i B_i`` have changed, in one sum, direction by direction in the coordinates that all
  clients were sent;
- ``products``: a sketch of ``sum_i w_i s_i B_i A_i`` in two sums (``lora.sketch``), ``range`` and ``projection``; where
  a sketch would hold as many numbers as the product itself, the product, in the first sum.

With either go, as counts, the weight in the place of the client's rank plan and how many numbers were clipped, and with
the first sum the mean loss of training times the weight. A number is multiplied by ``w_i / w`` with ``w`` the largest
weight of the round, so that its public bound holds for every client.
"""

# torch.from_numpy carries no type information.
# pyright: reportUnknownMemberType=false

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from flexlora.federation.streams import stream
from flexlora.lora.factors import LoraFactors
from flexlora.lora.sketch import projection_part, range_part, sketch_columns
from flexlora.uplink.fixed_point import Layout, Numbers, VectorPart, WordBits, encoded, num_clipped, on_the_way
from flexlora.uplink.masked_sum import MASKING_KINDS, masking_reply, words_message
from flexlora.uplink.masking_client import MaskingClient
from flexlora.uplink.phase_messages import Fields, fields_and_tensors, number_in
from flexlora.uplink.phases import Holding, PhaseError

SumKind = Literal["factors", "range", "projection"]

LARGEST_LOSS = 64.0
"""Nats per token to which a client's mean loss is clipped."""

SEED_BOUND = 2**63


@dataclass(frozen=True)
class ModuleTerms:
    """What is summed of one module.

    Attributes:
        shape: ``(out_features, in_features)``.
        size: ``factors``: the rank that all are padded to; otherwise the columns of the sketch, 0 to send the product.
        bounds: Of the absolute values of ``A`` and ``B``, or of ``Y`` and ``Z``, before the weight.
    """

    shape: tuple[int, int]
    size: int
    bounds: tuple[float, float]


@dataclass(frozen=True)
class SumTerms:
    """What a masked sum of this round holds: all of it is public.

    Attributes:
        kind: Of the phase.
        modules: Module -> what is summed of it.
        num_slots: Number of rank plans.
        largest_weight: Bound of the weights.
        num_clients: Most clients that are summed.
        word_bits: Bits of a number on its way.
        seed: Of the random columns of a sketch.
    """

    kind: SumKind
    modules: Mapping[str, ModuleTerms]
    num_slots: int
    largest_weight: int
    num_clients: int
    word_bits: WordBits = 32
    seed: int = 0

    def layout(self) -> Layout:
        """Return what the vector of a client is made of."""
        counts = [VectorPart("examples", self.num_slots), VectorPart("clipped", 1)]
        values: list[VectorPart] = []
        if self.kind != "projection":
            # Once a round: of two sums, the difference would be the loss of a client that dropped out in between.
            counts.append(VectorPart("scored", 1))
            values.append(VectorPart("loss", 1, LARGEST_LOSS))
        for module, own in self.modules.items():
            (out_features, in_features), (first, second) = own.shape, own.bounds
            if self.kind == "factors":
                values.append(VectorPart(f"{module}.A", own.size * in_features, first))
                values.append(VectorPart(f"{module}.B", out_features * own.size, second))
            elif self.kind == "range":
                values.append(VectorPart(f"{module}.Y", out_features * (own.size or in_features), first))
            elif own.size:
                values.append(VectorPart(f"{module}.Z", in_features * own.size, second))
        return Layout(counts, values, self.num_clients, self.word_bits)

    def as_fields(self) -> dict[str, Any]:
        """Return the terms as plain values."""
        modules = {name: [*own.shape, own.size, *own.bounds] for name, own in self.modules.items()}
        return {
            "modules": modules,
            "slots": self.num_slots,
            "largest_weight": self.largest_weight,
            "clients": self.num_clients,
            "word_bits": self.word_bits,
            "seed": self.seed,
        }


def terms_in(kind: SumKind, fields: Fields) -> SumTerms:
    """Return the terms that a request holds.

    Raises:
        FlexLoraError: If it holds none, or some that make no sense.
    """
    word_bits, modules = fields.get("word_bits"), fields.get("modules")
    if word_bits not in (16, 24, 32) or not isinstance(modules, dict):
        raise PhaseError("a request for numbers must say of which modules, and in words of 16, 24 or 32 bits")
    found: dict[str, ModuleTerms] = {}
    for name, values in cast("dict[str, Any]", modules).items():
        try:
            out_features, in_features, size, first, second = values
            found[name] = ModuleTerms((int(out_features), int(in_features)), int(size), (float(first), float(second)))
        except (TypeError, ValueError) as error:
            raise PhaseError(f"{name}: a request must hold shape, size and two bounds; {error}") from error
    return SumTerms(
        kind,
        found,
        number_in(fields, "slots", 1, 2**20),
        number_in(fields, "largest_weight", 1, 2**31),
        number_in(fields, "clients", 1, 2**31),
        word_bits,
        number_in(fields, "seed", 0, SEED_BOUND),
    )


@dataclass(frozen=True)
class SecureSum:
    """Says that clients hold what they train and give it to secure sums alone."""

    def begin(self, holding: Holding) -> "SumClient":
        """Return a client that has trained."""
        return SumClient(holding)


class SumClient:
    """One client in the secure sums of one round."""

    def __init__(self, holding: Holding) -> None:
        """Send nothing yet."""
        self._holding = holding
        self._masking = MaskingClient(str(holding.update.client_id))

    def answer(self, kind: str, request: bytes) -> bytes:
        """Return keys, shares or masked numbers.

        Raises:
            FlexLoraError: If this is not the time, the request is damaged, or the numbers have no place in the sum.
        """
        if kind in MASKING_KINDS:
            return masking_reply(self._masking, kind, request)
        if kind not in ("factors", "range", "projection"):
            raise PhaseError(f"a client of a secure sum knows no phase {kind!r}")
        fields, tensors = fields_and_tensors(request)
        terms = terms_in(kind, fields)
        layout, weight = terms.layout(), self._weight(terms)
        loss = self._holding.update.metrics.get("loss", float("nan"))
        numbers: dict[str, Numbers] = {"loss": np.array([loss if isfinite(loss) else 0.0])}
        numbers |= self._values(terms, tensors)
        numbers = {name: own * (weight / terms.largest_weight) for name, own in numbers.items()}
        slot = number_in(fields, "slot", 0, terms.num_slots - 1)
        counts = {
            "examples": [weight if place == slot else 0 for place in range(terms.num_slots)],
            "scored": [weight if isfinite(loss) else 0],
            "clipped": [min(num_clipped(layout, numbers), layout.most_counted)],
        }
        rng = stream(self._holding.seed, "rounding", kind)
        masked = self._masking.masked(fields, encoded(layout, counts, numbers, rng))
        return words_message(torch.from_numpy(on_the_way(layout, masked)))

    def _weight(self, terms: SumTerms) -> int:
        weight = self._holding.update.weight
        if not (weight.is_integer() and 0 < weight <= terms.largest_weight):
            raise PhaseError(f"a weight in a secure sum is an integer in 1..{terms.largest_weight}; got {weight}")
        return int(weight)

    def _values(self, terms: SumTerms, tensors: Mapping[str, Tensor]) -> dict[str, Numbers]:
        """Return the numbers of this client, those of modules that it lacks zero."""
        payload, sent = self._holding.update.payload, self._holding.sent.trainable
        values: dict[str, Numbers] = {}
        for module, own in terms.modules.items():
            (out_features, in_features), size = own.shape, own.size
            trained = payload.get(module)
            if trained is not None and trained.shape != own.shape:
                raise PhaseError(f"{module}: the request is about {own.shape}; this client trained {trained.shape}")
            factors = trained or LoraFactors(torch.zeros(0, in_features), torch.zeros(out_features, 0), 1.0)
            if terms.kind == "factors":
                A, B = _moved(factors, sent.get(module), size)
                values |= {f"{module}.A": A.numpy(), f"{module}.B": B.numpy()}
            elif terms.kind == "range":
                values[f"{module}.Y"] = self._range(terms, module, factors, tensors).numpy()
            elif size:
                Q = _tensor(tensors, f"{module}.Q", (out_features, size))
                values[f"{module}.Z"] = projection_part(factors, Q).numpy()
        return values

    def _range(self, terms: SumTerms, module: str, factors: LoraFactors, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the client's part of ``Y``, or its product."""
        (_, in_features), size = terms.modules[module].shape, terms.modules[module].size
        if not size:
            return factors.delta()
        warm = tensors.get(f"{module}.warm")
        if warm is None or warm.ndim != 2 or warm.shape[1] != in_features:
            raise PhaseError(f"{module}: a request for a range must hold the rows that a sketch begins with")
        return range_part(factors, sketch_columns(warm, size, stream(terms.seed, "sketch", module)))


def _moved(trained: LoraFactors, start: LoraFactors | None, rank: int) -> tuple[Tensor, Tensor]:
    """Return how ``A`` and ``s B`` have changed, in float64, zero beyond the client's rank."""
    if trained.rank > rank:
        raise PhaseError(f"the factors of a secure sum have ranks of at most {rank}; got {trained.rank}")
    if start is None:
        return torch.zeros(rank, trained.shape[1]).double(), torch.zeros(trained.shape[0], rank).double()
    ours = trained.to(torch.float64).with_scaling(1.0).pad(rank)
    theirs = start.to(torch.float64).with_scaling(1.0).pad(rank)
    return ours.A - theirs.A, ours.B - theirs.B


def _tensor(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, int]) -> Tensor:
    found = tensors.get(name)
    if found is None or tuple(found.shape) != shape:
        raise PhaseError(f"{name}: a request must hold a tensor of shape {shape} here")
    return found
