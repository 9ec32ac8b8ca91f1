"""Rounds under differential privacy: what is noised, accounted for, remembered, and when a run has to stop."""

import dataclasses
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from flexlora.federation.clients import ClientSpec, sample_cohort
from flexlora.federation.messages import ClientFailure
from flexlora.lora.factors import LoraFactors
from flexlora.rounds.loop import run_rounds
from flexlora.rounds.loop_parts import Loop, Privacy
from flexlora.rounds.records import read_records
from flexlora.uplink.clip_and_noise import AdaptiveClip, ClipAndNoise
from flexlora.uplink.privacy_budget import ClientSampling, PrivacyBudget, epsilon_of

pytest.importorskip("dp_accounting")

EVERYBODY = ClientSampling("fixed", 4, 4)


def private(
    loop: Loop,
    *,
    clip: float = 0.5,
    noise_multiplier: float = 2.0,
    target_epsilon: float | None = None,
    adaptive: AdaptiveClip | None = None,
    sampling: ClientSampling = EVERYBODY,
) -> Loop:
    mechanism = ClipAndNoise(clip, noise_multiplier, float(sampling.cohort_size), "products", 7, adaptive)
    return dataclasses.replace(
        loop, privacy=Privacy(mechanism, PrivacyBudget(sampling, 1e-5, target_epsilon, accountant="rdp"))
    )


def test_records_say_what_was_spent_clipped_and_noised(tmp_path, drift, loop_in):
    loop = private(loop_in(tmp_path, drift), clip=1.0)
    run_rounds(loop)
    records = read_records(tmp_path / "records.jsonl")
    assert records[0].privacy is None
    for record in records[1:]:
        spent = record.privacy
        assert spent is not None and loop.privacy is not None
        expected = epsilon_of(loop.privacy.budget, ((2.0, record.server_round),))
        assert spent.epsilon == pytest.approx(expected, rel=1e-5)
        assert (spent.delta, spent.clip, spent.noise_multiplier) == (1e-5, 1.0, 2.0)
        # 6 x 4 and 5 x 9 entries; a mean over a denominator of 4.
        assert (spent.num_noised, spent.noise_deviation) == (69, 0.5)
        assert spent.median_norm is not None and (spent.num_clipped > 0) == (spent.median_norm > 1.0)


def test_with_a_wide_clip_and_hardly_any_noise_a_round_is_the_mean_of_changes_with_equal_weights(
    tmp_path, drift, loop_in
):
    loop = private(loop_in(tmp_path, drift, num_rounds=1), clip=1e3, noise_multiplier=1e-9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flexlora.rounds.private.epsilon_of", lambda budget, spending: 1.0)
        outcome = run_rounds(loop)
    start = {module: dense(own) for module, own in loop.federation.initial_adapter.items()}
    state = loop.aggregator.init(loop.federation.initial_adapter)
    sent = [
        loop.aggregator.broadcast(state, client.plan.resolve(start)).trainable for client in loop.federation.clients
    ]
    for module, before in start.items():
        mean = before.copy()
        for client, own in zip(loop.federation.clients, sent, strict=True):
            trained = drift(1, client, own)[module]
            mean += (dense(trained) - dense(own[module])) / 4
        U, S, Vh = np.linalg.svd(mean, full_matrices=False)
        kept = loop.federation.server_ranks[module]
        np.testing.assert_allclose(
            outcome.state.spectra[module].delta().numpy(), (U[:, :kept] * S[:kept]) @ Vh[:kept], atol=2e-5
        )


def dense(factors: LoraFactors) -> np.ndarray:
    return factors.scaling * factors.B.double().numpy() @ factors.A.double().numpy()


def test_a_run_stops_before_the_round_that_would_exceed_its_budget(tmp_path, drift, loop_in):
    budget = PrivacyBudget(EVERYBODY, 1e-5, accountant="rdp")
    costs = [epsilon_of(budget, ((2.0, rounds),)) for rounds in (2, 3)]
    target = sum(costs) / 2
    loop = private(loop_in(tmp_path, drift, num_rounds=10), target_epsilon=target)
    outcome = run_rounds(loop)
    assert outcome.server_round == 2 and "the privacy budget is spent" in str(outcome.stopped)
    last = read_records(tmp_path / "records.jsonl")[-1]
    assert last.stopped == outcome.stopped and last.evaluation is not None
    assert last.privacy is not None and last.privacy.epsilon <= target
    # It stays spent when the run is resumed.
    assert run_rounds(loop).server_round == 2


@pytest.mark.parametrize("moment", [("client", 2), ("evaluating", 3), ("done", 3)])
def test_a_private_run_cut_off_anywhere_resumes_to_the_same_bits(
    tmp_path, moment, drift, loop_in, assert_resumes_to, untimed
):
    options = {"adaptive": AdaptiveClip(0.5, 0.2, 4.0)}
    whole = run_rounds(private(loop_in(tmp_path / "whole", drift, num_rounds=5), **options))
    cut = private(loop_in(tmp_path / "cut", drift, num_rounds=5), **options)
    assert_resumes_to(whole, cut, moment)
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "cut")
    clips = [record.privacy.clip for record in read_records(tmp_path / "cut" / "records.jsonl")[1:] if record.privacy]
    assert len(set(clips)) == 5


def test_clients_that_fail_count_as_not_sampled_and_a_round_without_any_has_noise_all_the_same(
    tmp_path, drift, loop_in
):
    def change(server_round: int, client: ClientSpec, factors: Mapping[str, LoraFactors]) -> object:
        if server_round == 2 or client.client_id == "a":
            return ClientFailure(client.client_id, "train", "off")
        return drift(server_round, client, factors)

    run_rounds(private(loop_in(tmp_path, change, num_rounds=3)))
    records = read_records(tmp_path / "records.jsonl")
    assert records[2].note == "no client survived; the state has the noise of the round alone"
    assert records[2].spectra != records[1].spectra
    assert [record.privacy.noise_deviation for record in records[1:] if record.privacy] == [0.25] * 3
    assert records[3].num_ok == 3 and records[3].privacy is not None and records[3].privacy.epsilon > 0


def test_cohorts_drawn_by_poisson_sampling_vary_and_may_be_empty(tmp_path, drift, loop_in):
    loop = loop_in(tmp_path, drift, num_rounds=12, cohort_size=1, sampling="poisson", max_failed_rounds=1)
    outcome = run_rounds(private(loop, sampling=ClientSampling("poisson", 4, 1)))
    assert outcome.stopped is None and outcome.server_round == 12
    sizes = {len(record.clients) for record in read_records(tmp_path / "records.jsonl")[1:]}
    assert 0 in sizes and len(sizes) > 2
    assert torch.isfinite(outcome.state.spectra["block.mlp"].S).all()


def test_cohorts_come_from_a_seed_of_their_own_where_there_is_one(tmp_path, drift, loop_in):
    loop = loop_in(tmp_path, drift, num_rounds=6, cohort_size=2, cohort_seed=9)
    run_rounds(private(loop))
    found = [[one.client_id for one in record.clients] for record in read_records(tmp_path / "records.jsonl")[1:]]
    own, of_the_run = (
        [[one.client_id for one in sample_cohort(loop.federation.clients, 2, seed, number)] for number in range(1, 7)]
        for seed in (9, loop.settings.seed)
    )
    assert found == own != of_the_run
