"""Checks that a method makes the same of a cohort's sum as of its updates."""

# Matrices keep their letters.
# pyright: reportConstantRedefinition=false

import torch

from flexlora.aggregators.contract_case import Case
from flexlora.aggregators.contract_compare import require_equal
from flexlora.federation.messages import CohortFactors, CohortProducts, Update
from flexlora.lora.factors import LoraFactors


def a_sum_counts_as_its_cohort(case: Case) -> None:
    """``aggregate_sum`` of the sums of a cohort gives what ``aggregate`` gives of its updates, in any round."""
    if case.traits.secure_sums is None:
        return
    for state in (case.start(), case.after_a_round()):
        updates = case.updates(state, seed=3)
        expected = case.deltas(case.aggregator.aggregate(state, updates))
        found = case.aggregator.aggregate_sum(state, sum_of(case, updates))
        require_equal(case.deltas(found), expected, "secure_sums: the sum of a cohort must count as the cohort does")


def sum_of(case: Case, updates: list[Update]) -> CohortFactors | CohortProducts:
    """Return what a secure sum would tell of updates, added up in the clear."""
    sums: dict[str, LoraFactors] = {}
    weight_by_rank: dict[str, dict[int, float]] = {}
    for module, (out_features, in_features) in case.shapes.items():
        ranks = weight_by_rank[module] = {}
        A, B = torch.zeros(case.server_rank, in_features).double(), torch.zeros(out_features, case.server_rank).double()
        product = torch.zeros(out_features, in_features).double()
        for update in updates:
            if (own := update.payload.get(module)) is None:
                continue
            wide = own.to(torch.float64).with_scaling(1.0).pad(case.server_rank)
            A, B = A + update.weight * wide.A, B + update.weight * wide.B
            product += update.weight * own.delta()
            ranks[own.rank] = ranks.get(own.rank, 0.0) + update.weight
        whole = LoraFactors(torch.eye(in_features).double(), product, 1.0)
        sums[module] = LoraFactors(A, B, 1.0) if case.traits.secure_sums == "factors" else whole
    total = sum(update.weight for update in updates)
    if case.traits.secure_sums == "factors":
        return CohortFactors(total, sums, weight_by_rank)
    return CohortProducts(total, sums, weight_by_rank)
