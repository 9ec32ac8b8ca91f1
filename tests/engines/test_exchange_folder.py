"""What travels in folders is what would travel in a round's bytes, and PEFT reads it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from flexlora.engines.base import Parcel, RoundOrder
from flexlora.engines.exchange_folder import (
    ExchangeFolderEngine,
    read_broadcast,
    read_reply,
    why_not_files,
    write_broadcast,
    write_reply,
)
from flexlora.engines.exchange_manifest import (
    BroadcastManifest,
    ExchangeError,
    ReplyManifest,
    check_files,
    facts_of,
    manifest_text,
    read_manifest_file,
)
from flexlora.engines.flower.run_settings import RunSettings, training_record
from flexlora.errors import FlexLoraError
from flexlora.federation.clients import ClientSpec, RankPlan
from flexlora.federation.messages import Broadcast, ClientFailure, SparseMask, TailPenalty, Update
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling
from flexlora.training.base_model import target_modules
from flexlora.training.one_client import LocalTraining
from flexlora.uplink.wire import decode_broadcast, encode_broadcast

HEX = "0123456789abcdef"


def settings(**changes: object) -> RunSettings:
    told: dict[str, object] = {
        "run_id": HEX * 2,
        "seed": 1,
        "base_model": "org/base",
        "base_sha256": HEX * 4,
        "dtype": "float32",
        "dropout": 0.0,
        "largest_rank": 8,
        "target_modules": "all-linear",
        "scaling": "constant_alpha",
        "lora_alpha": 16.0,
        "template": "plain",
        "max_length": 64,
        "loss_on": "answers",
        "wire_dtype": "float32",
        "training": training_record(LocalTraining()),
    }
    return RunSettings(**{**told, **changes})  # type: ignore[arg-type]


def manifest(**changes: object) -> BroadcastManifest:
    told: dict[str, object] = {"run_id": HEX * 2, "base_sha256": HEX * 4, "config_sha256": HEX * 4, "plan": "small"}
    told |= {"server_round": 3, "rank": 4, "scalings": {}, "files": {}, "learning_rate": 0.1, "run": settings()}
    return BroadcastManifest(**{**told, **changes})  # type: ignore[arg-type]


@pytest.fixture
def shapes(network: PreTrainedModel) -> dict[str, tuple[int, int]]:
    return target_modules(network, "all-linear")


def adapter_of(shapes: dict[str, tuple[int, int]], scaling: Scaling, seed: int = 0) -> AdapterState:
    """Return an adapter whose ranks differ from module to module."""
    generator = torch.Generator().manual_seed(seed)
    ranks = {path: 2 + index % 3 for index, path in enumerate(sorted(shapes))}
    return {
        path: LoraFactors(
            torch.randn(rank, shapes[path][1], generator=generator),
            torch.randn(shapes[path][0], rank, generator=generator),
            scaling(rank),
        )
        for path, rank in ranks.items()
    }


def reply_to(asked: BroadcastManifest, **changes: object) -> ReplyManifest:
    told = {name: getattr(asked, name) for name in ("run_id", "server_round", "base_sha256", "config_sha256", "plan")}
    told |= {"rank": asked.rank, "scalings": {}, "files": {}, "client": "north", "num_examples": 7, "loss": 1.5}
    return ReplyManifest(**{**told, "started_from": HEX * 4, "steps": 3, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("policy", ["constant_alpha", "constant_ratio"])
def test_a_broadcast_comes_back_to_the_bits_that_its_bytes_would_bring(
    tmp_path: Path, shapes: dict[str, tuple[int, int]], dtype: str, policy: str
) -> None:
    scaling = Scaling(policy, 16.0)  # type: ignore[arg-type]
    broadcast = Broadcast(adapter_of(shapes, scaling), adapter_of(shapes, scaling, 1), "B")
    wire = decode_broadcast(encode_broadcast(broadcast, dtype))  # type: ignore[arg-type]
    write_broadcast(tmp_path / "sent", wire, manifest(run=settings(wire_dtype=dtype)))
    told, found, _ = read_broadcast(tmp_path / "sent")
    assert (found.train_factors, told.server_round) == ("B", 3)
    for ours, theirs in ((found.trainable, wire.trainable), (found.frozen, wire.frozen)):
        assert ours is not None and theirs is not None and list(ours) == list(theirs)
        for path, own in ours.items():
            assert own.A.dtype == getattr(torch, dtype) and own.scaling == theirs[path].scaling
            if policy == "constant_alpha" or dtype != "float32":
                assert torch.equal(own.A, theirs[path].A) and torch.equal(own.B, theirs[path].B)
            torch.testing.assert_close(own.B, theirs[path].B, rtol=1e-6, atol=1e-7)


def test_scalings_that_are_no_whole_alpha_come_back_with_their_factors(
    tmp_path: Path, shapes: dict[str, tuple[int, int]]
) -> None:
    sent = adapter_of(shapes, Scaling("rslora", 1.7))
    write_broadcast(tmp_path / "sent", Broadcast(sent), manifest())
    found = read_broadcast(tmp_path / "sent")[1].trainable
    assert {path: own.scaling for path, own in found.items()} == {path: own.scaling for path, own in sent.items()}
    for path, own in found.items():
        torch.testing.assert_close(own.A, sent[path].A, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(own.B, sent[path].B, rtol=1e-6, atol=1e-7)


def test_stock_peft_loads_the_folder_of_a_broadcast_and_computes_the_same(
    tmp_path: Path, network: PreTrainedModel, shapes: dict[str, tuple[int, int]]
) -> None:
    sent = adapter_of(shapes, Scaling("constant_alpha", 16.0))
    write_broadcast(tmp_path / "sent", Broadcast(sent), manifest())
    model = PeftModel.from_pretrained(network, tmp_path / "sent")
    try:
        for path, own in sent.items():
            delta = model.base_model.model.get_submodule(path).get_delta_weight("default")
            exact = own.scaling * own.B.double().numpy() @ own.A.double().numpy()
            np.testing.assert_allclose(delta.detach().numpy(), exact, rtol=1e-4, atol=1e-4)
    finally:
        model.unload()


@pytest.fixture
def sent(shapes: dict[str, tuple[int, int]]) -> Broadcast:
    return Broadcast(adapter_of(shapes, Scaling("constant_alpha", 16.0)))


@pytest.fixture
def reply(tmp_path: Path, shapes: dict[str, tuple[int, int]], sent: Broadcast) -> Path:
    update = Update("north", adapter_of(shapes, Scaling("constant_alpha", 16.0), 2), 7.0)
    write_reply(tmp_path / "reply", update, reply_to(manifest()), manifest())
    return tmp_path / "reply"


def test_an_update_comes_back_with_its_weight_and_what_was_measured(
    reply: Path, sent: Broadcast, shapes: dict[str, tuple[int, int]]
) -> None:
    told, _ = read_manifest_file(reply, ReplyManifest)
    update = read_reply(reply, told, sent, "float32")
    assert (update.client_id, update.weight, update.metrics) == ("north", 7.0, {"loss": 1.5, "steps": 3.0})
    returned = adapter_of(shapes, Scaling("constant_alpha", 16.0), 2)
    assert all(torch.equal(own.A, returned[path].A) for path, own in update.payload.items())
    # What a client may not train is what it was sent, whatever it returns.
    halves = read_reply(reply, told, replace(sent, train_factors="B"), "float32").payload
    assert all(torch.equal(own.A, sent.trainable[path].A) for path, own in halves.items())
    assert all(torch.equal(own.B, returned[path].B) for path, own in halves.items())


def resealed(folder: Path, **changes: object) -> ReplyManifest:
    """Write the manifest that fits the files as they are now, as somebody who means harm would."""
    told = read_manifest_file(folder, ReplyManifest)[0].model_copy(update={"files": facts_of(folder), **changes})
    (folder / "round.json").write_text(manifest_text(told))
    return told


def change_weights(folder: Path, path: str, value: object) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(key for key in tensors if path in key and "lora_B" in key)
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value if isinstance(value, torch.Tensor) else torch.full_like(tensors[name], value)  # type: ignore[arg-type]
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def outcome(folder: Path, sent: Broadcast, shapes: dict[str, tuple[int, int]]) -> str:
    """Return why the server does not take a reply."""
    told, _ = read_manifest_file(folder, ReplyManifest)
    with pytest.raises(FlexLoraError) as caught:
        ExchangeFolderEngine({"north": (folder, told)}, {}, shapes).check("north", sent, "float32")
    return str(caught.value)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (float("nan"), "NaN or infinity"),
        (float("inf"), "NaN or infinity"),
        (3e38, "the norm of"),
        (torch.zeros(3, 5), "not a product"),
        (None, "lora_B"),
    ],
)
def test_factors_that_no_client_may_send_are_refused_by_name(
    reply: Path, sent: Broadcast, shapes: dict[str, tuple[int, int]], value: object, why: str
) -> None:
    change_weights(reply, min(shapes), value)
    resealed(reply)
    assert why in outcome(reply, sent, shapes)


def test_weights_that_are_no_safetensors_are_refused(
    reply: Path, sent: Broadcast, shapes: dict[str, tuple[int, int]]
) -> None:
    weights = reply / "adapter_model.safetensors"
    for content in (b"\x80\x04pickle", (2**62).to_bytes(8, "little") + b"{}", weights.read_bytes()[:-9], b""):
        weights.write_bytes(content)
        resealed(reply)
        assert "safetensors" in outcome(reply, sent, shapes)


def test_a_reply_larger_than_any_answer_is_refused_by_its_size(
    reply: Path, sent: Broadcast, shapes: dict[str, tuple[int, int]]
) -> None:
    with (reply / "adapter_model.safetensors").open("ab") as file:
        file.truncate(10_000_000)
    resealed(reply)
    assert "must have at most" in outcome(reply, sent, shapes)


def test_scalings_of_a_reply_are_those_that_were_sent(
    reply: Path, sent: Broadcast, shapes: dict[str, tuple[int, int]]
) -> None:
    scalings = {path: own.scaling for path, own in sent.trainable.items()}
    for wrong in (-1.0, 0.0, 2 * scalings[min(shapes)]):
        resealed(reply, scalings={"trainable": {**scalings, min(shapes): wrong}})
        assert "scaling" in outcome(reply, sent, shapes)
    resealed(reply, scalings={"trainable": {**scalings, "more": 1.0}})
    assert "no others" in outcome(reply, sent, shapes)
    resealed(reply, scalings={"trainable": scalings, "frozen": {}})
    assert "the trained factors alone" in outcome(reply, sent, shapes)


def test_the_engine_yields_one_outcome_a_client_and_raises_nothing(
    reply: Path, sent: Broadcast, shapes: dict[str, tuple[int, int]]
) -> None:
    told, _ = read_manifest_file(reply, ReplyManifest)
    plan = RankPlan("small", (("", 4),))
    cohort = [ClientSpec(name, plan, 7) for name in ("east", "north", "south")]
    order = RoundOrder(3, 0, 0.1, "float32", (), cohort, {plan: Parcel(sent, "float32")})
    engine = ExchangeFolderEngine({"north": (reply, told)}, {"east": "it was late"}, shapes)
    east, north, south = engine.train(order)
    assert isinstance(east, ClientFailure) and east.reason == "it was late"
    assert isinstance(north, Update) and north.up_bytes > 0
    assert isinstance(south, ClientFailure) and south.stage == "validate"


def test_broadcasts_that_are_more_than_adapters_cannot_travel_so(tmp_path: Path, sent: Broadcast) -> None:
    cores = {path: torch.eye(own.rank) for path, own in sent.trainable.items()}
    for broadcast, why in (
        (replace(sent, train_factors="core", cores=cores), "cores"),
        (replace(sent, train_factors="B", mask=SparseMask(0.1, 1)), "chosen entries"),
        (replace(sent, kept="B"), "keep a factor"),
        (replace(sent, tail_penalty=TailPenalty(0.1, 0.5)), "a penalty"),
    ):
        assert why in str(why_not_files(broadcast))
        with pytest.raises(ExchangeError, match=why):
            write_broadcast(tmp_path / "never", broadcast, manifest())
        assert not (tmp_path / "never").exists()
    assert why_not_files(sent) is None


def test_equal_broadcasts_give_equal_bytes_and_replace_nothing(tmp_path: Path, sent: Broadcast) -> None:
    for name in ("one", "two"):
        write_broadcast(tmp_path / name, sent, manifest())
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["README.md", "adapter_config.json", "adapter_model.safetensors", "round.json"]
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)
    check_files(tmp_path / "one", read_manifest_file(tmp_path / "one", BroadcastManifest)[0].files)
    assert json.loads((tmp_path / "one" / "round.json").read_text())["kind"] == "broadcast"
    with pytest.raises(OSError):
        write_broadcast(tmp_path / "one", sent, manifest())
