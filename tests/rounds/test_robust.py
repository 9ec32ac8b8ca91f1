"""Rounds that believe clients only so far: what is recorded, kept, and resumed."""

import dataclasses
from collections.abc import Mapping

import pytest
import torch

from flexlora.federation.clients import ClientSpec
from flexlora.federation.messages import ClientFailure
from flexlora.lora.factors import LoraFactors
from flexlora.rounds.loop import run_rounds
from flexlora.rounds.loop_parts import Loop
from flexlora.rounds.records import read_records
from flexlora.uplink.robust_settings import RobustSettings


def robust(loop: Loop, rule: str, num_malicious: int = 1, **settings: float) -> Loop:
    return dataclasses.replace(loop, robust=RobustSettings(rule, num_malicious, **settings))  # type: ignore[arg-type]


@pytest.fixture
def liar(drift):
    """Returns clients of which d returns ten times the reverse of its change."""

    def change(server_round: int, client: ClientSpec, factors: Mapping[str, LoraFactors]) -> object:
        trained = drift(server_round, client, factors)
        if client.client_id != "d":
            return trained
        return {
            module: LoraFactors(own.A, own.B - 10 * (trained[module].B - own.B), own.scaling)
            for module, own in factors.items()
        }

    return change


def test_a_liar_is_left_out_and_the_record_says_so(tmp_path, liar, loop_in):
    run_rounds(robust(loop_in(tmp_path, liar), "trimmed_mean"))
    for record in read_records(tmp_path / "records.jsonl")[1:]:
        assert record.robust is not None and record.robust.rule == "trimmed_mean"
        assert record.robust.shares == {"a": 1.0, "b": 1.0, "c": 1.0, "d": 0.0}
        assert record.num_ok == 4


def test_leaving_a_liar_out_is_a_round_without_it_in_which_all_count_the_same(tmp_path, drift, liar, loop_in):
    def without(server_round: int, client: ClientSpec, factors: Mapping[str, LoraFactors]) -> object:
        failed = ClientFailure(client.client_id, "train", "off")
        return failed if client.client_id == "d" else drift(server_round, client, factors)

    outcome = run_rounds(robust(loop_in(tmp_path / "liar", liar, num_rounds=1), "trimmed_mean"))
    alone = loop_in(tmp_path / "alone", without, num_rounds=1)
    same = [dataclasses.replace(client, num_examples=7) for client in alone.federation.clients]
    expected = run_rounds(dataclasses.replace(alone, federation=dataclasses.replace(alone.federation, clients=same)))
    for module, spectrum in expected.state.spectra.items():
        torch.testing.assert_close(outcome.state.spectra[module].delta(), spectrum.delta(), atol=1e-9, rtol=1e-9)


def test_a_change_beyond_the_bound_counts_in_part(tmp_path, liar, loop_in):
    run_rounds(robust(loop_in(tmp_path, liar, num_rounds=1), "norm_bound"))
    robust_record = read_records(tmp_path / "records.jsonl")[1].robust
    assert robust_record is not None and 0 < robust_record.shares["d"] < 0.5


def test_a_cohort_too_small_for_its_rule_keeps_the_state(tmp_path, drift, loop_in):
    run_rounds(robust(loop_in(tmp_path, drift, num_rounds=1), "krum"))
    record = read_records(tmp_path / "records.jsonl")[1]
    assert "krum needs at least 5 clients against 1 that are malicious; got 4" in str(record.note)
    assert record.robust is None and len(record.clients) == 4


@pytest.mark.parametrize("moment", [("client", 2), ("evaluating", 3)])
def test_a_robust_run_cut_off_resumes_to_the_same_bits(tmp_path, moment, drift, loop_in, assert_resumes_to, untimed):
    whole = run_rounds(robust(loop_in(tmp_path / "whole", drift), "median_of_means"))
    assert_resumes_to(whole, robust(loop_in(tmp_path / "cut", drift), "median_of_means"), moment)
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "cut")
