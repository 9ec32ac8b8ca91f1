"""A client's work gives what a simulation gives, and refuses what its user has not chosen."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch

from flexlora.data.encoded_clients import encode_client
from flexlora.data.instructions import load_instructions
from flexlora.engines.base import Parcel, RoundOrder
from flexlora.engines.flower.client_settings import ClientSettings, uniform_plan
from flexlora.engines.flower.client_work import ClientWork
from flexlora.engines.flower.envelope import Envelope, from_bytes, to_bytes
from flexlora.engines.flower.run_settings import RunSettings
from flexlora.engines.simulation import SimulationEngine
from flexlora.federation.clients import ClientSpec
from flexlora.federation.messages import Broadcast, Update
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.one_client import LocalTraining
from flexlora.uplink.compression import compressed_size, read_compressed
from flexlora.uplink.wire import decode_broadcast, decode_update, encode_broadcast

TRAINING = LocalTraining(batch_size=4, max_steps=2)
SEED, RANK = 7, 3


@pytest.fixture(scope="module")
def broadcast(first_broadcast: Callable[[int], Broadcast]) -> Broadcast:
    return first_broadcast(RANK)


def settings_of(silos: Path, **changes: object) -> ClientSettings:
    return ClientSettings(
        **{"client_id": "north", "data": silos / "north.jsonl", "plan": uniform_plan(RANK), **changes}
    )


def asked(work: ClientWork, kind: str, flower_run: RunSettings, payload: bytes = b"", **fields: object) -> Envelope:
    fields = {"run": flower_run.model_dump(mode="json"), "client_id": "north", "server_round": 2, **fields}
    return from_bytes(work.answer(to_bytes(Envelope(kind, fields, payload))))


def test_a_client_is_described_without_its_data(silos: Path, flower_run: RunSettings) -> None:
    described = asked(ClientWork(settings_of(silos)), "describe", flower_run)
    assert described.kind == "description"
    # 80 % of 24 rows.
    assert described.fields["num_examples"] == 20
    assert described.fields["plan"] == {"name": "rank-3", "patterns": [list(one) for one in uniform_plan(3).patterns]}
    assert described.fields["base_sha256"] == flower_run.base_sha256
    assert "north 3" not in json.dumps(dict(described.fields)) and described.payload == b""


@pytest.mark.parametrize("bits", [8, 4])
def test_compressed_updates_are_those_of_the_simulation(
    silos: Path, flower_run: RunSettings, broadcast: Broadcast, bits: Literal[8, 4]
) -> None:
    run = flower_run.model_copy(update={"upload_bits": bits, "error_feedback": True})
    work, packet = ClientWork(settings_of(silos)), encode_broadcast(broadcast, "bfloat16")
    fields = {"learning_rate": 0.01}
    replies = [asked(work, "train", run, packet, **fields, remembers=counted) for counted in (None, 2, 1)]
    fresh = asked(ClientWork(settings_of(silos)), "train", run, packet, **fields)
    how = run.compression
    assert how is not None
    assert len(replies[0].payload) == compressed_size(decode_broadcast(packet), how)
    assert replies[0].payload == fresh.payload
    # What the first one lost is in the second one, but only because the server says that its round counted.
    assert replies[1].payload != fresh.payload
    assert replies[2].payload == fresh.payload
    whole = asked(work, "train", flower_run, packet, learning_rate=0.01)
    first = read_compressed(replies[0].payload, Update("north", {}, 1.0), decode_broadcast(packet), how)
    expected = decode_update(whole.payload, Update("north", {}, 1.0), broadcast)
    for module, factors in expected.payload.items():
        change = (factors.B.float() - broadcast.trainable[module].B).abs().max()
        error = (first.payload[module].B - factors.B.float()).abs().max()
        assert error <= change / (2 ** (bits - 1) - 1) + 2**-7


def test_training_gives_what_the_simulation_of_the_same_folder_gives(
    silos: Path, flower_run: RunSettings, embedded: AdaptedModel, broadcast: Broadcast
) -> None:
    packet = encode_broadcast(broadcast, "bfloat16")
    reply = asked(ClientWork(settings_of(silos)), "train", flower_run, packet, learning_rate=0.01)
    assert reply.kind == "update"
    corpus, _ = load_instructions(silos, SEED, partition="natural", client_from="file")
    sequences = encode_client(
        "north",
        corpus.clients["north"].train,
        embedded.tokenizer,
        SEED,
        template="alpaca",
        max_length=128,
        loss_on="answers",
    )
    client = ClientSpec("north", uniform_plan(RANK), len(sequences))
    order = RoundOrder(2, SEED, 0.01, "bfloat16", (), (client,), {client.plan: Parcel(broadcast, "bfloat16")})
    (expected,) = SimulationEngine(embedded, lambda _: sequences, TRAINING).train(order)
    assert isinstance(expected, Update)
    got = decode_update(reply.payload, Update("north", {}, 1.0), broadcast)
    assert reply.fields["num_examples"] == expected.weight
    assert reply.fields["metrics"]["loss"] == pytest.approx(expected.metrics["loss"], rel=1e-5)
    assert len(reply.payload) == expected.up_bytes
    for module, factors in expected.payload.items():
        torch.testing.assert_close(got.payload[module].B, factors.B, rtol=2**-7, atol=1e-5)
        torch.testing.assert_close(got.payload[module].A, factors.A, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"base_sha256": "0" * 64}, "must have the same weights"),
        ({"base_model": "org/other"}, "must train the same base model"),
        ({"largest_rank": 2}, "must be in 1..2"),
    ],
)
def test_a_run_that_does_not_suit_the_client_is_refused(
    silos: Path, flower_run: RunSettings, change: dict[str, object], reason: str
) -> None:
    reply = asked(ClientWork(settings_of(silos)), "describe", flower_run.model_copy(update=change))
    assert (reply.kind, reply.fields["stage"]) == ("failure", "refused")
    assert reason in reply.fields["reason"]


def test_a_model_in_a_folder_of_its_own_is_known_by_its_weights(
    silos: Path, flower_run: RunSettings, tmp_path: Path, embedded: AdaptedModel
) -> None:
    from transformers import AutoModelForCausalLM

    from flexlora.data.pretraining import BASE_FOLDER

    network = AutoModelForCausalLM.from_pretrained(BASE_FOLDER, dtype=torch.float32)
    network.save_pretrained(tmp_path / "copy", max_shard_size="1MB")
    embedded.tokenizer.save_pretrained(tmp_path / "copy")
    assert len(list((tmp_path / "copy").glob("*.safetensors"))) > 1
    described = asked(ClientWork(settings_of(silos, model=str(tmp_path / "copy"))), "describe", flower_run)
    assert described.kind == "description", described.fields


def test_the_server_cannot_send_more_than_the_client_has_said_it_can_train(
    silos: Path, flower_run: RunSettings, broadcast: Broadcast
) -> None:
    work = ClientWork(settings_of(silos, plan=uniform_plan(RANK - 1)))
    reply = asked(work, "train", flower_run, encode_broadcast(broadcast, "float32"), learning_rate=0.01)
    assert reply.kind == "failure" and "trains rank 2 at most" in reply.fields["reason"]


def test_a_request_for_another_client_is_refused(silos: Path, flower_run: RunSettings, broadcast: Broadcast) -> None:
    packet = encode_broadcast(broadcast, "float32")
    reply = asked(ClientWork(settings_of(silos)), "train", flower_run, packet, learning_rate=0.01, client_id="south")
    assert reply.fields["reason"] == "this client is 'north'; the request is for 'south'"


@pytest.mark.parametrize("request_bytes", [b"", b"garbage", b"FLE1\xff\xff\xff\xff", b"FLE1\x02\x00\x00\x00[]"])
def test_garbage_is_answered_by_a_failure(silos: Path, request_bytes: bytes) -> None:
    reply = from_bytes(ClientWork(settings_of(silos)).answer(request_bytes))
    assert (reply.kind, reply.fields["stage"]) == ("failure", "refused")


def test_settings_that_no_run_has_are_refused_by_name(silos: Path, flower_run: RunSettings) -> None:
    fields = {**flower_run.model_dump(mode="json"), "trust_remote_code": True}
    reply = from_bytes(ClientWork(settings_of(silos)).answer(to_bytes(Envelope("describe", {"run": fields}))))
    assert "trust_remote_code" in reply.fields["reason"]


def test_data_that_are_not_there_are_named(silos: Path, flower_run: RunSettings) -> None:
    reply = asked(ClientWork(settings_of(silos, data=silos / "west.jsonl")), "describe", flower_run)
    assert "there is none at" in reply.fields["reason"]


def test_the_ranks_of_a_client_without_any_are_chosen_from_the_run(silos: Path, flower_run: RunSettings) -> None:
    work = ClientWork(settings_of(silos, plan=None), lambda run, model, examples: uniform_plan(run.largest_rank))
    assert asked(work, "describe", flower_run).fields["plan"]["name"] == "rank-8"
    assert "needs a rank" in asked(ClientWork(settings_of(silos, plan=None)), "describe", flower_run).fields["reason"]
