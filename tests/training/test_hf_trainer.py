import dataclasses
import os

import pytest
import torch
from transformers import Trainer, TrainingArguments

from flexlora.federation.messages import Broadcast
from flexlora.trainers import from_hf
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.base_model import target_modules
from flexlora.training.one_client import LocalTraining, TrainingError, train_client
from flexlora.training.own_loop import as_train_client

SETTINGS = LocalTraining("sgd", batch_size=4, num_epochs=3.0)


def stock_trainer(model, train_dataset, tokenizer, settings, output_dir, **options):
    defaults = {
        "learning_rate": settings.learning_rate,
        "per_device_train_batch_size": settings.batch_size,
        "num_train_epochs": settings.num_epochs,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "logging_steps": 1,
        "use_cpu": True,
    }
    arguments = TrainingArguments(output_dir=output_dir, **{**defaults, **options})
    return Trainer(model=model, args=arguments, train_dataset=train_dataset, processing_class=tokenizer)


def trl_trainer(model, train_dataset, tokenizer, settings, output_dir):
    trl = pytest.importorskip("trl")
    arguments = trl.SFTConfig(
        output_dir=output_dir,
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.batch_size,
        num_train_epochs=settings.num_epochs,
        lr_scheduler_type="constant",
        optim="sgd",
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    rows = pytest.importorskip("datasets").Dataset.from_list(train_dataset)
    return trl.SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)


def with_options(**options):
    return as_train_client(from_hf(lambda *arguments: stock_trainer(*arguments, **options)))


@pytest.fixture
def broadcast(model, random_adapter, scaling):
    shapes = target_modules(model.network, "all-linear")
    return Broadcast(random_adapter(shapes, {path: 2 for path in shapes}, scaling))


def distance(left, right):
    pairs = [(getattr(left[path], name), getattr(right[path], name)) for path in left for name in "AB"]
    return max(float((first - second).abs().max()) for first, second in pairs)


def test_an_sft_trainer_trains_as_a_stock_one_does(model, broadcast, make_examples):
    examples = make_examples(8)
    stock, expected = with_options()(model, broadcast, examples, SETTINGS, 0.01, seed=5)
    adapter, metrics = as_train_client(from_hf(trl_trainer))(model, broadcast, examples, SETTINGS, 0.01, seed=5)
    assert distance(adapter, stock) < 0.01 * distance(stock, broadcast.trainable)
    assert metrics["steps"] == expected["steps"] == 6
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_a_stock_trainer_lowers_the_loss_and_leaves_the_base_alone(model, broadcast, make_examples, tmp_path, capsys):
    base = {name: p.clone() for name, p in model.network.named_parameters()}
    there = set(os.listdir())
    adapter, metrics = with_options()(model, broadcast, make_examples(8), SETTINGS, 0.01, seed=5)
    assert distance(adapter, broadcast.trainable) > 1e-3
    assert metrics["steps"] == 6
    assert metrics["last_loss"] < metrics["first_loss"]
    assert metrics["first_loss"] > metrics["loss"] > metrics["last_loss"]
    after = {name: p for name, p in model.network.named_parameters() if "lora_" not in name}
    assert all(torch.equal(value, base[name.replace(".base_layer", "")]) for name, value in after.items())
    assert set(os.listdir()) == there
    assert capsys.readouterr() == ("", "")


def test_equal_seeds_give_equal_adapters_and_others_do_not(make_network, tokenizer, broadcast, make_examples):
    model = AdaptedModel(make_network(), tokenizer, dropout=0.1)
    train, examples = with_options(), make_examples(8)
    state = torch.get_rng_state()
    first, again, other = (
        train(model, broadcast, examples, SETTINGS, 0.01, seed=seed)[0] for seed in (2**40, 2**40, 2**40 + 1)
    )
    assert distance(first, again) == 0.0
    assert distance(first, other) > 1e-5
    assert torch.equal(torch.get_rng_state(), state)


def test_a_step_on_all_examples_is_the_step_of_the_built_in_loop(model, broadcast, make_examples):
    settings = LocalTraining("sgd", batch_size=8, num_epochs=1.0)
    examples = make_examples(8)
    expected, measured = train_client(model, broadcast, examples, settings, 0.01, seed=1)
    adapter, metrics = with_options()(model, broadcast, examples, settings, 0.01, seed=1)
    assert distance(adapter, expected) < 1e-6
    assert distance(adapter, broadcast.trainable) > 1e-4
    assert metrics["loss"] == pytest.approx(measured["loss"], rel=1e-5)


def test_a_trainer_saves_nothing_even_if_asked_to(model, broadcast, make_examples, monkeypatch):
    saved = []
    monkeypatch.setattr(Trainer, "_save_checkpoint", lambda self, *arguments, **options: saved.append(self))
    with_options(save_strategy="steps", save_steps=1)(model, broadcast, make_examples(4), SETTINGS, 0.01, seed=1)
    assert saved == []


def test_the_tokenizer_of_the_model_decides_no_longer_than_training(model, broadcast, make_examples):
    model.network.generation_config.eos_token_id = [2, 3]
    model.network.config.bos_token_id = 9
    with_options()(model, broadcast, make_examples(4), SETTINGS, 0.01, seed=1)
    assert model.network.generation_config.eos_token_id == [2, 3]
    assert model.network.config.bos_token_id == 9


def test_a_factory_must_build_a_trainer_in_the_folder_it_is_given(model, broadcast, make_examples, tmp_path):
    examples = make_examples(2)
    with pytest.raises(TrainingError, match=r"must return a transformers\.Trainer; got NoneType"):
        as_train_client(from_hf(lambda *arguments: None))(model, broadcast, examples, SETTINGS, 0.01, seed=1)
    elsewhere = as_train_client(from_hf(lambda *arguments: stock_trainer(*arguments[:4], str(tmp_path))))
    with pytest.raises(TrainingError, match="must pass its output_dir on"):
        elsewhere(model, broadcast, examples, SETTINGS, 0.01, seed=1)


def test_only_the_factors_of_the_method_are_trained(model, broadcast, make_examples):
    only_A = dataclasses.replace(broadcast, train_factors="A")
    adapter, _ = with_options()(model, only_A, make_examples(4), SETTINGS, 0.01, seed=1)
    assert all(torch.equal(adapter[path].B, own.B) for path, own in broadcast.trainable.items())
    assert distance(adapter, broadcast.trainable) > 1e-5
