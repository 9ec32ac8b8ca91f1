"""Scripts of users train what the server sent, with its learning rate, its frozen branch and its FedProx term."""

import copy
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, Trainer, TrainingArguments

from flexlora.engines.exchange_client import open_broadcast
from flexlora.engines.exchange_folder import read_reply, write_broadcast
from flexlora.engines.exchange_loop import Participation, patch, take_part
from flexlora.engines.exchange_manifest import BroadcastManifest, ExchangeError, ReplyManifest, read_manifest_file
from flexlora.engines.flower.run_settings import RunSettings, training_record
from flexlora.federation.messages import Broadcast
from flexlora.lora.factors import AdapterState, LoraFactors
from flexlora.training.base_digest import base_digest
from flexlora.training.base_model import load_base_model, target_modules
from flexlora.training.one_client import LocalTraining

pytest.importorskip("accelerate")

ROOT = Path(__file__).parents[2]
RUN, RATE, PROXIMAL = "ab" * 16, 0.05, 4.0


def adapter(shapes: dict[str, tuple[int, int]], rank: int, seed: int) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    return {
        path: LoraFactors(
            0.1 * torch.randn(rank, shapes[path][1], generator=generator),
            0.1 * torch.randn(shapes[path][0], rank, generator=generator),
            4.0 / rank,
        )
        for path in sorted(shapes)
    }


@pytest.fixture(scope="module")
def base() -> tuple[Any, PreTrainedTokenizerBase]:
    return load_base_model("embedded", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def broadcast(tmp_path_factory: pytest.TempPathFactory, base: tuple[Any, PreTrainedTokenizerBase]) -> Path:
    """Return a broadcast with a frozen branch of a run with a strong FedProx term."""
    folder, digest = tmp_path_factory.mktemp("round") / "small", base_digest("embedded")
    shapes = target_modules(base[0], ("q_proj", "down_proj"))
    run = RunSettings(
        run_id=RUN,
        seed=1,
        base_model="flexlora/embedded-llama-1m",
        base_sha256=digest,
        dtype="float32",
        dropout=0.0,
        largest_rank=2,
        target_modules=("q_proj", "down_proj"),
        scaling="constant_alpha",
        lora_alpha=4.0,
        template="plain",
        max_length=64,
        loss_on="answers",
        wire_dtype="float32",
        training=training_record(LocalTraining(proximal=PROXIMAL)),
    )
    manifest = BroadcastManifest(
        run_id=RUN,
        base_sha256=digest,
        config_sha256="cd" * 32,
        server_round=1,
        plan="small",
        rank=2,
        scalings={},
        files={},
        learning_rate=RATE,
        run=run,
    )
    write_broadcast(folder, Broadcast(adapter(shapes, 2, 0), adapter(shapes, 1, 1)), manifest)
    return folder


def rows(tokenizer: PreTrainedTokenizerBase, number: int) -> list[dict[str, list[int]]]:
    # All of one length, so that no collator has to pad.
    return [
        {"input_ids": (ids := tokenizer(f"say {index} now")["input_ids"][:4]), "labels": ids} for index in range(number)
    ]


def stock_trainer_of(base: tuple[Any, PreTrainedTokenizerBase], folder: Path, **arguments: Any) -> Trainer:
    network, tokenizer = copy.deepcopy(base[0]), base[1]
    told = {"optim": "sgd", "max_grad_norm": 0.0, "per_device_train_batch_size": 4, "max_steps": 2, "seed": 5}
    told |= {"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True, **arguments}
    settings = TrainingArguments(str(folder), **told)
    return Trainer(model=network, args=settings, train_dataset=rows(tokenizer, 8), processing_class=tokenizer)


def trl_trainer_of(base: tuple[Any, PreTrainedTokenizerBase], folder: Path, **arguments: Any) -> Trainer:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    network, tokenizer = copy.deepcopy(base[0]), base[1]
    told = {"optim": "sgd", "max_grad_norm": 0.0, "per_device_train_batch_size": 4, "max_steps": 2, "seed": 5}
    told |= {"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True, "bf16": False}
    told |= {"activation_checkpointing": False, "dataset_kwargs": {"skip_prepare_dataset": True}, **arguments}
    data = datasets.Dataset.from_list(rows(tokenizer, 8))
    settings = trl.SFTConfig(output_dir=str(folder), **told)
    return trl.SFTTrainer(model=network, args=settings, train_dataset=data, processing_class=tokenizer)


def expected_factors(base: tuple[Any, PreTrainedTokenizerBase], sent: Broadcast, batches: list[Any]) -> AdapterState:
    """Return what SGD by hand makes of the factors: autograd on dense matrices, FedProx as it is defined."""
    network = copy.deepcopy(base[0])
    assert sent.frozen is not None
    start = {path: (own.A.clone(), own.B.clone()) for path, own in sent.trainable.items()}
    factors = {path: [part.clone().requires_grad_() for part in pair] for path, pair in start.items()}
    weights = {path: network.get_submodule(path).weight.detach() for path in factors}
    scaling = {path: own.scaling for path, own in sent.trainable.items()}
    for batch in batches:
        changed = {
            f"{path}.weight": weights[path]
            + sent.frozen[path].delta().float()
            + scaling[path] * factors[path][1] @ factors[path][0]
            for path in factors
        }
        loss = torch.func.functional_call(network, changed, kwargs={**batch, "use_cache": False}).loss
        for path, (A, B) in factors.items():
            distance = scaling[path] * (B @ A - start[path][1] @ start[path][0])
            loss = loss + PROXIMAL / 2 * distance.square().sum()
        parameters = [part for pair in factors.values() for part in pair]
        for part, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            part.data -= RATE * gradient
    return {path: LoraFactors(A.detach(), B.detach(), scaling[path]) for path, (A, B) in factors.items()}


@pytest.mark.parametrize(("trainer_of", "passes"), [(stock_trainer_of, 1), (stock_trainer_of, 2), (trl_trainer_of, 1)])
def test_a_patched_trainer_does_what_the_definitions_say(
    base: tuple[Any, PreTrainedTokenizerBase],
    broadcast: Path,
    tmp_path: Path,
    trainer_of: Callable[..., Trainer],
    passes: int,
) -> None:
    trainer = trainer_of(
        base, tmp_path / "out", gradient_accumulation_steps=passes, per_device_train_batch_size=4 // passes
    )
    part = patch(trainer, broadcast, client="north")
    seen: list[Any] = []
    one_pass = trainer.training_step

    def look(model: Any, inputs: Any, *more: Any) -> Any:
        seen.append({name: value.clone() for name, value in inputs.items()})
        return one_pass(model, inputs, *more)

    trainer.training_step = look  # type: ignore[method-assign]
    trainer.train()
    part.reply(tmp_path / "reply")
    told, _ = read_manifest_file(tmp_path / "reply", ReplyManifest)
    assert (told.client, told.num_examples, told.steps, told.started_from) == ("north", 8, 2, part.opened.digest)
    assert told.loss == pytest.approx(trainer.state.log_history[-1]["train_loss"])
    sent = open_broadcast(broadcast).sent
    batches = [
        {name: torch.cat([one[name] for one in seen[first : first + passes]]) for name in seen[0]}
        for first in range(0, len(seen), passes)
    ]
    expected = expected_factors(base, sent, batches)
    for path, own in read_reply(tmp_path / "reply", told, sent, "float32").payload.items():
        assert not torch.equal(own.B, sent.trainable[path].B)
        torch.testing.assert_close(own.A, expected[path].A, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(own.B, expected[path].B, rtol=1e-4, atol=1e-6)


def test_any_other_loop_takes_part_by_a_callback(
    base: tuple[Any, PreTrainedTokenizerBase], broadcast: Path, tmp_path: Path
) -> None:
    network, tokenizer = copy.deepcopy(base[0]), base[1]
    part = take_part(network, tokenizer, broadcast, client="north")
    assert isinstance(part, Participation) and part.settings.proximal == PROXIMAL
    optimizer = torch.optim.SGD([one for one in network.parameters() if one.requires_grad], part.learning_rate)
    ids = torch.tensor([row["input_ids"] for row in rows(tokenizer, 4)])
    batches = [{"input_ids": ids, "labels": ids}] * 2
    for batch in batches:
        network(**batch).loss.backward()
        part.complete_gradients()
        optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(ExchangeError, match="needs num_examples"):
        part.reply(tmp_path / "reply")
    part.reply(tmp_path / "reply", num_examples=4, loss=1.0, steps=2)
    told, _ = read_manifest_file(tmp_path / "reply", ReplyManifest)
    sent = open_broadcast(broadcast).sent
    expected = expected_factors(base, sent, batches)
    for path, own in read_reply(tmp_path / "reply", told, sent, "float32").payload.items():
        torch.testing.assert_close(own.B, expected[path].B, rtol=1e-4, atol=1e-6)


def test_what_cannot_take_part_is_named(
    base: tuple[Any, PreTrainedTokenizerBase], broadcast: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    trainer = stock_trainer_of(base, tmp_path / "out")
    with pytest.raises(ExchangeError, match=r"patch needs a transformers.Trainer"):
        patch(trainer.model, broadcast, client="north")  # type: ignore[arg-type]
    with pytest.raises(ExchangeError, match="one word"):
        patch(trainer, broadcast, client="../x")
    part = patch(trainer, broadcast, client="north")
    with pytest.raises(ExchangeError, match=r"call trainer.train\(\) first"):
        part.reply(tmp_path / "reply")
    # A model that has an adapter already, this one included, is not the base.
    with pytest.raises(ExchangeError, match="without adapters"):
        patch(trainer, broadcast, client="north")
    network = get_peft_model(copy.deepcopy(base[0]), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ExchangeError, match="Leave peft_config out"):
        take_part(network, base[1], broadcast, client="north")  # type: ignore[arg-type]
    trainer = stock_trainer_of(base, tmp_path / "out")
    trainer.create_optimizer()
    with pytest.raises(ExchangeError, match="must not have an optimizer yet"):
        patch(trainer, broadcast, client="north")
    other = tmp_path / "other"
    changed = copy.deepcopy(base[0])
    changed.model.norm.weight.data += 1
    changed.save_pretrained(other)
    with pytest.raises(ExchangeError, match="must have the weights of the server's"):
        take_part(AutoModelForCausalLM.from_pretrained(other), base[1], broadcast, client="north")


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_the_example_script_trains_and_replies(broadcast: Path, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("own_training_script", ROOT / "examples" / "own_training_script.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    lines = [json.dumps({"prompt": f"say {number}", "completion": f"{number}"}) for number in range(6)]
    (tmp_path / "clinic-a.jsonl").write_text("\n".join(lines))
    script.main(str(broadcast), str(tmp_path / "clinic-a.jsonl"), str(tmp_path / "reply"))
    told, _ = read_manifest_file(tmp_path / "reply", ReplyManifest)
    assert (told.client, told.num_examples, told.steps) == ("clinic-a", 6, 4)
