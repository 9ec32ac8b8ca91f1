"""The server's end of a secure sum of what a cohort trained: it learns the sum over the cohort and nothing of a client.

See ``secure_sum`` for what is summed and ``masking_client`` for how. Bounds of the numbers, by which they become
integers, follow from what the server sent and from how far training can move an entry: they are public.
"""

# Matrices keep their letters, and torch.from_numpy carries no type information.
# pyright: reportConstantRedefinition=false, reportUnknownMemberType=false

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from flexlora.errors import FlexLoraError
from flexlora.federation.messages import CohortFactors, CohortProducts
from flexlora.federation.streams import stream, stream_seed
from flexlora.lora.factors import LoraFactors
from flexlora.lora.sketch import NUM_PROBES, largest_in_columns, largest_in_rows, product_of, range_of
from flexlora.uplink.base import SecureTotal, SummedCohort, Traffic
from flexlora.uplink.fixed_point import Numbers, WordBits
from flexlora.uplink.masked_sum import MaskedSums, SumOfNumbers
from flexlora.uplink.masking_client import SESSION_BYTES
from flexlora.uplink.masking_server import MaskingServer, MaskingTerms
from flexlora.uplink.phase_messages import Fields
from flexlora.uplink.phases import Ask, ClientPhases
from flexlora.uplink.secure_sum import LARGEST_LOSS, ModuleTerms, SecureSum, SumTerms


class SecureSumError(FlexLoraError, ValueError):
    """A cohort, or settings, of which no secure sum can be taken."""


@dataclass(frozen=True)
class SecureSumSettings:
    """How secure sums are taken.

    Attributes:
        summed: What the method needs.
        largest_change: How far a round of training can move an entry of ``A`` or ``B``, per learning rate.
        threshold: Share of neighbours that must survive; fewer that collude take no mask off.
        num_neighbours: Of each client; None is everybody.
        word_bits: Bits of a number on its way.
        columns: Of a sketch; None is as many as the largest rank of the round and a few.
        most_bytes: Of the numbers that a client sends in a round; lowers ``columns``.
    """

    summed: Literal["factors", "products"]
    largest_change: float
    threshold: float = 2 / 3
    num_neighbours: int | None = None
    word_bits: WordBits = 32
    columns: int | None = None
    most_bytes: int | None = None

    @property
    def phases(self) -> ClientPhases:
        """What clients do."""
        return SecureSum()

    def total(self, cohort: SummedCohort, ask: Ask, traffic: Traffic) -> SecureTotal:
        """Return what the sums of a round tell of its cohort; note in ``traffic`` what each phase cost.

        Raises:
            SecureSumError: If a weight is no integer, the byte budget leaves no column, or a sum cannot be right.
            MaskedSumError: If there are too few clients, or too many drop out; nothing is known then.
        """
        terms = MaskingTerms(1 if self.summed == "factors" else 2, self.threshold, self.num_neighbours)
        rng = stream(cohort.seed, "neighbours", cohort.server_round)
        server = MaskingServer(sorted(cohort.slot_of), terms, os.urandom(SESSION_BYTES), rng)
        first = _first_terms(self, cohort)
        sums = MaskedSums(server, ask, traffic)
        sums.open()
        if self.summed == "factors":
            return _factors_total(cohort, first, _sum(cohort, sums, first, {}))
        return _products_total(cohort, first, sums)


def sketch_size(settings: SecureSumSettings, shapes: Mapping[str, tuple[int, int]], largest_rank: int) -> int:
    """Return the columns of the sketches of a round, probes included: as configured, within the byte budget.

    Raises:
        SecureSumError: If the budget leaves none.
    """
    columns = settings.columns or largest_rank + 2 * NUM_PROBES
    if settings.most_bytes is None:
        return columns
    per_column = (
        settings.word_bits // 8 * sum(out_features + in_features for out_features, in_features in shapes.values())
    )
    if settings.most_bytes < per_column * (NUM_PROBES + 1):
        raise SecureSumError(
            f"privacy.secure_sum.max_bytes must be at least {per_column * (NUM_PROBES + 1)}, of which a sketch has "
            f"{NUM_PROBES + 1} columns; got {settings.most_bytes}"
        )
    return min(columns, settings.most_bytes // per_column)


def _first_terms(settings: SecureSumSettings, cohort: SummedCohort) -> SumTerms:
    """Return the terms of the first sum of a round."""
    weights = list(cohort.weights.values())
    if not all(isfinite(weight) and weight.is_integer() and weight > 0 for weight in weights):
        raise SecureSumError(f"weights in a secure sum are positive integers; got {sorted(set(weights))[:3]}")
    change = settings.largest_change * cohort.learning_rate
    largest_rank = max(own.rank for sent in cohort.broadcasts for own in sent.trainable.values())
    columns = sketch_size(settings, cohort.shapes, largest_rank) if settings.summed == "products" else 0
    modules: dict[str, ModuleTerms] = {}
    for module, (out_features, in_features) in sorted(cohort.shapes.items()):
        starts = [sent.trainable[module] for sent in cohort.broadcasts if module in sent.trainable]
        if not starts:
            continue
        if settings.summed == "factors":
            scaling = max(abs(start.scaling) for start in starts)
            bounds = change, change * scaling
            modules[module] = ModuleTerms((out_features, in_features), cohort.server_ranks[module], bounds)
            continue
        k = min(columns, out_features, in_features)
        size = 0 if k * (out_features + in_features) >= out_features * in_features else k
        rows, across = (
            max(largest(start, change) for start in starts) for largest in (largest_in_rows, largest_in_columns)
        )
        modules[module] = ModuleTerms((out_features, in_features), size, (rows, across))
    return SumTerms(
        "factors" if settings.summed == "factors" else "range",
        modules,
        len(cohort.broadcasts),
        int(max(weights)),
        len(cohort.slot_of),
        settings.word_bits,
        stream_seed(cohort.seed, "sketch", cohort.server_round),
    )


def _fields_of(terms: SumTerms, cohort: SummedCohort) -> Callable[[str], Fields]:
    """Return what each client is told of a sum."""
    common = terms.as_fields()
    return lambda client_id: {**common, "slot": cohort.slot_of[client_id]}


def _sum(cohort: SummedCohort, sums: MaskedSums, terms: SumTerms, tensors: Mapping[str, Tensor]) -> SumOfNumbers:
    """Return a sum whose counts are those of the clients in it: a wrong mask would spoil counts and numbers alike.

    Raises:
        SecureSumError: If they are not.
    """
    found = sums.total(terms.kind, terms.layout(), _fields_of(terms, cohort), tensors)
    expected = [0] * terms.num_slots
    for client_id in found.survivors:
        expected[cohort.slot_of[client_id]] += int(cohort.weights[client_id])
    if found.counts["examples"] != expected:
        raise SecureSumError(
            f"the sum of the phase {terms.kind} must count {sum(expected)} examples, those of the clients in it; it "
            f"counts {sum(found.counts['examples'])}: a client has masked, shared or counted wrongly"
        )
    return found


def _factors_total(cohort: SummedCohort, terms: SumTerms, found: SumOfNumbers) -> SecureTotal:
    """Return the sums of the factors: their changes, and what all have started from."""
    weights = found.counts["examples"]
    sums: dict[str, LoraFactors] = {}
    for module, rank in sorted(cohort.server_ranks.items()):
        out_features, in_features = cohort.shapes[module]
        A, B = torch.zeros(rank, in_features).double(), torch.zeros(out_features, rank).double()
        if module in terms.modules:
            A += _numbers(found.values[f"{module}.A"], terms, (rank, in_features))
            B += _numbers(found.values[f"{module}.B"], terms, (out_features, rank))
        for sent, weight in zip(cohort.broadcasts, weights, strict=True):
            if module in sent.trainable:
                start = sent.trainable[module].to(torch.float64).with_scaling(1.0).pad(rank)
                A, B = A + weight * start.A, B + weight * start.B
        sums[module] = LoraFactors(A, B, 1.0)
    total = CohortFactors(float(sum(weights)), sums, _weight_by_rank(cohort, weights))
    return SecureTotal(total, found.survivors, _loss(terms, found), found.counts["clipped"][0], None)


def _products_total(cohort: SummedCohort, first: SumTerms, sums: MaskedSums) -> SecureTotal:
    """Return the sums of the products, sketched in two passes where that is less than the products themselves."""
    # Those of the largest rank: the first rows of any other are among them.
    warm = {
        module: max(
            (sent.trainable[module] for sent in cohort.broadcasts if module in sent.trainable), key=lambda own: own.rank
        ).A.to(torch.float32)
        for module, own in first.modules.items()
        if own.size
    }
    tensors = {f"{module}.warm": rows.contiguous() for module, rows in warm.items()}
    found = _sum(cohort, sums, first, tensors)
    loss = _loss(first, found)
    products: dict[str, LoraFactors] = {}
    bases: dict[str, Tensor] = {}
    left, whole, modules = 0.0, 0.0, dict[str, ModuleTerms]()
    for module, own in first.modules.items():
        (out_features, in_features), size = own.shape, own.size
        Y = _numbers(found.values[f"{module}.Y"], first, (out_features, size or in_features))
        if not size:
            products[module] = LoraFactors(torch.eye(in_features, dtype=torch.float64), Y, 1.0)
            continue
        bases[module], error = range_of(Y, in_features)
        left += error**2
        modules[module] = ModuleTerms(own.shape, bases[module].shape[1], own.bounds)
    num_clipped = found.counts["clipped"][0]
    if bases:
        second = SumTerms(
            "projection", modules, first.num_slots, first.largest_weight, first.num_clients, first.word_bits
        )
        tensors = {f"{module}.Q": Q for module, Q in bases.items()}
        last = _sum(cohort, sums, second, tensors)
        for module, Q in bases.items():
            Z = _numbers(last.values[f"{module}.Z"], second, (cohort.shapes[module][1], Q.shape[1]))
            products[module] = product_of(Q, Z)
            whole += float(products[module].norm()) ** 2
        # Clients that dropped out in between are in the range, and not in what it is applied to.
        ratio = _weight(last) / _weight(found)
        left, num_clipped = left * ratio**2, num_clipped + last.counts["clipped"][0]
        if _weight(last) != _weight(found):
            dense = [module for module in products if module not in bases]
            products |= {module: _scaled(products[module], ratio) for module in dense}
        found = last
    weights = found.counts["examples"]
    total = CohortProducts(float(sum(weights)), dict(sorted(products.items())), _weight_by_rank(cohort, weights))
    error = sqrt(left / (left + whole)) if left > 0 else 0.0
    return SecureTotal(total, found.survivors, loss, num_clipped, error)


def _scaled(factors: LoraFactors, factor: float) -> LoraFactors:
    return LoraFactors(factors.A, factors.B * factor, factors.scaling)


def _weight(found: SumOfNumbers) -> float:
    return float(sum(found.counts["examples"]))


def _weight_by_rank(cohort: SummedCohort, weights: Sequence[int]) -> dict[str, dict[int, float]]:
    """Return, for each module, the weight of the clients at each rank."""
    found: dict[str, dict[int, float]] = {module: {} for module in sorted(cohort.shapes)}
    for sent, weight in zip(cohort.broadcasts, weights, strict=True):
        for module, own in sent.trainable.items():
            found[module][own.rank] = found[module].get(own.rank, 0.0) + weight
    return found


def _loss(terms: SumTerms, found: SumOfNumbers) -> float | None:
    scored = found.counts["scored"][0]
    loss = float(found.values["loss"][0]) * terms.largest_weight / scored if scored else None
    return loss if loss is None else min(max(loss, 0.0), LARGEST_LOSS)


def _numbers(values: Numbers, terms: SumTerms, shape: tuple[int, int]) -> Tensor:
    """Return a sum with the weights as they are."""
    return torch.from_numpy(np.asarray(values) * terms.largest_weight).reshape(shape)
