import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from flexlora.federation.messages import Broadcast
from flexlora.federation.streams import stream_seed
from flexlora.lora.factors import LoraFactors, Scaling
from flexlora.training.adapted_model import AdaptedModel, initial_adapter
from flexlora.training.base_model import target_modules
from flexlora.training.linear_modules import ModelError

# Stock PEFT asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOKENS = torch.tensor([[1, 40, 50, 60, 70, 80], [1, 90, 33, 20, 10, 200]])


def logits(network):
    with torch.no_grad():
        return network(input_ids=TOKENS).logits


def mixed_ranks(shapes):
    """Ranks 1, 2, 3, ... in turn, and every fourth module left out."""
    return {path: 1 + index % 7 for index, path in enumerate(shapes) if index % 4}


def stock_logits(network, adapter):
    """What PEFT itself computes, with its own patterns, wrapping and state."""
    config = LoraConfig(
        r=1,
        lora_alpha=1,
        target_modules=list(adapter),
        rank_pattern={path: factors.rank for path, factors in adapter.items()},
        alpha_pattern={path: factors.scaling * factors.rank for path, factors in adapter.items()},
    )
    wrapped = get_peft_model(copy.deepcopy(network), config).eval()
    for path, factors in adapter.items():
        layer = wrapped.base_model.model.get_submodule(path)
        layer.lora_A["default"].weight.data.copy_(factors.A)
        layer.lora_B["default"].weight.data.copy_(factors.B)
    return logits(wrapped)


@pytest.mark.parametrize("policy", ["constant_alpha", "rslora"])
def test_logits_equal_those_of_stock_peft_with_mixed_ranks_and_missing_modules(
    network, tokenizer, random_adapter, policy
):
    shapes = target_modules(network, "all-linear")
    adapter = random_adapter(shapes, mixed_ranks(shapes), Scaling(policy, 5.0))
    expected, base = stock_logits(network, adapter), logits(network)
    model = AdaptedModel(network, tokenizer)
    model.load(Broadcast(adapter))
    torch.testing.assert_close(logits(model.network), expected)
    assert (expected - base).abs().max() > 0.1


def test_a_frozen_branch_is_added_and_not_trained(network, tokenizer, random_adapter, scaling):
    shapes = target_modules(network, "all-linear")
    trainable = random_adapter(shapes, {path: 2 for path in list(shapes)[:9]}, scaling, seed=1)
    frozen = random_adapter(shapes, {path: 5 for path in list(shapes)[4:]}, scaling, seed=2)
    together = {}
    for path in shapes:
        parts = [adapter[path] for adapter in (trainable, frozen) if path in adapter]
        A = torch.cat([part.A for part in parts])
        B = torch.cat([part.B * part.scaling for part in parts], dim=1)
        together[path] = LoraFactors(A, B, 1.0)
    expected = stock_logits(network, together)
    model = AdaptedModel(network, tokenizer)
    model.load(Broadcast(trainable, frozen))
    torch.testing.assert_close(logits(model.network), expected)
    assert {id(p) for p in network.parameters() if p.requires_grad} == {id(p) for p in model.trained_parameters()}
    assert sum(p.numel() for p in model.trained_parameters()) == sum(2 * sum(shapes[path]) for path in trainable)


def test_taking_turns_leaves_nothing_of_the_previous_client(network, tokenizer, random_adapter, scaling):
    shapes = target_modules(network, "all-linear")
    names = list(shapes)
    turns = [
        random_adapter(shapes, {path: 30 for path in names}, scaling, seed=1),
        random_adapter(shapes, {path: 2 for path in names[:3]}, scaling, seed=2),
        random_adapter(shapes, {path: 2 for path in names[2:8]}, scaling, seed=3),
        {},
    ]
    expected = [stock_logits(network, turn) for turn in turns[:3]] + [logits(network)]
    model = AdaptedModel(network, tokenizer)
    for index in (0, 1, 2, 3, 1, 0, 2, 3):
        model.load(Broadcast(turns[index], frozen=turns[0] if index == 9 else None))
        torch.testing.assert_close(logits(network), expected[index])


def test_what_is_read_has_exactly_the_ranks_and_is_a_copy(model, random_adapter, scaling):
    shapes = target_modules(model.network, "all-linear")
    ranks = mixed_ranks(shapes)
    adapter = random_adapter(shapes, ranks, scaling)
    generator = torch.get_rng_state()
    model.load(Broadcast(adapter))
    assert torch.equal(torch.get_rng_state(), generator)
    read = model.read()
    assert {path: factors.rank for path, factors in read.items()} == ranks
    assert list(read) == sorted(read)
    with torch.no_grad():
        for parameter in model.trained_parameters():
            parameter.zero_()
    for path, factors in adapter.items():
        assert torch.equal(read[path].A, factors.A)
        assert torch.equal(read[path].B, factors.B)
        assert read[path].scaling == factors.scaling


@pytest.mark.parametrize("train_factors", ["both", "A", "B"])
def test_only_the_asked_factors_get_gradients(model, random_adapter, scaling, train_factors):
    shapes = target_modules(model.network, ["q_proj", "down_proj"])
    model.load(Broadcast(random_adapter(shapes, {path: 3 for path in shapes}, scaling), None, train_factors))
    model.network(input_ids=TOKENS).logits.square().sum().backward()
    with_gradient = {name for name, p in model.network.named_parameters() if p.grad is not None}
    wanted = {"both": "AB", "A": "A", "B": "B"}[train_factors]
    assert with_gradient == {f"{path}.lora_{name}.trainable.weight" for path in shapes for name in wanted}
    assert len(model.trained_parameters()) == len(with_gradient)


def test_without_adapter_gives_the_base_and_then_everything_as_before(model, random_adapter, scaling):
    base = logits(model.network)
    shapes = target_modules(model.network, "all-linear")
    adapter = random_adapter(shapes, {path: 3 for path in shapes}, scaling)
    model.load(Broadcast(adapter, frozen=adapter, train_factors="B"))
    adapted = logits(model.network)
    with model.without_adapter():
        torch.testing.assert_close(logits(model.network), base)
        assert not any(parameter.requires_grad for parameter in model.network.parameters())
    assert torch.equal(logits(model.network), adapted)
    trained = {id(parameter) for parameter in model.trained_parameters()}
    assert {id(p) for p in model.network.parameters() if p.requires_grad} == trained


def test_initial_factors_are_those_of_peft_and_leave_the_global_generator_alone(model, scaling):
    shapes = target_modules(model.network, "all-linear")
    before = torch.get_rng_state()
    adapter = model.initial_adapter(mixed_ranks(shapes), scaling, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    # Stock PEFT draws from the global generator, so it gets the module's own seed there.
    for path, factors in adapter.items():
        network = torch.nn.ModuleDict({"linear": torch.nn.Linear(shapes[path][1], shapes[path][0])})
        stock = get_peft_model(network, LoraConfig(r=factors.rank, target_modules=["linear"])).base_model.model.linear
        with torch.random.fork_rng():
            torch.manual_seed(stream_seed(7, "initial_adapter", path))
            stock.reset_lora_parameters("default", True)
        assert torch.equal(factors.A, stock.lora_A["default"].weight)
        assert torch.equal(factors.B, stock.lora_B["default"].weight)
        assert factors.A.abs().max() <= 1 / math.sqrt(shapes[path][1])
        assert factors.scaling == scaling(factors.rank)


def test_initial_factors_need_no_model_but_its_shapes(model, scaling):
    shapes = target_modules(model.network, "all-linear")
    ranks = mixed_ranks(shapes)
    bare, loaded = initial_adapter(shapes, ranks, scaling, seed=7), model.initial_adapter(ranks, scaling, seed=7)
    assert list(bare) == list(loaded)
    assert all(torch.equal(bare[path].A, own.A) and bare[path].scaling == own.scaling for path, own in loaded.items())


def test_initial_factors_depend_on_seed_and_module_only(model, scaling):
    q, v = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
    both = model.initial_adapter({q: 4, v: 4}, scaling, seed=1)
    assert torch.equal(model.initial_adapter({v: 4}, scaling, seed=1)[v].A, both[v].A)
    assert not torch.equal(both[q].A, both[v].A)
    assert not torch.equal(model.initial_adapter({q: 4}, scaling, seed=2)[q].A, both[q].A)


def test_factors_stay_float32_on_a_bfloat16_base(make_network, tokenizer, random_adapter, scaling):
    network = make_network(torch.bfloat16)
    shapes = target_modules(network, "all-linear")
    adapter = random_adapter(shapes, mixed_ranks(shapes), scaling)
    expected = stock_logits(network, adapter)
    model = AdaptedModel(network, tokenizer)
    model.load(Broadcast(adapter))
    assert torch.equal(logits(network), expected)
    assert {parameter.dtype for parameter in model.trained_parameters()} == {torch.float32}
    assert {factors.A.dtype for factors in model.read().values()} == {torch.float32}


def test_factors_of_a_wrong_shape_or_module_are_refused_by_name(model):
    path = "model.layers.0.self_attn.k_proj"
    with pytest.raises(ModelError, match=r"k_proj: factors must multiply to \(16, 32\); got B \(32, 2\)"):
        model.load(Broadcast({path: LoraFactors(torch.zeros(2, 32), torch.zeros(32, 2), 1.0)}))
    with pytest.raises(ModelError, match=r"layers.9.*no module"):
        model.load(Broadcast({"model.layers.9": LoraFactors(torch.zeros(2, 32), torch.zeros(16, 2), 1.0)}))
    with pytest.raises(ModelError, match=r"embed_tokens: LoRA needs a linear module.*Embedding"):
        model.load(Broadcast({"model.embed_tokens": LoraFactors(torch.zeros(2, 32), torch.zeros(16, 2), 1.0)}))


def test_conv1d_modules_of_gpt2_are_adapted_too(tokenizer, random_adapter, scaling):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=16, n_layer=1, n_head=2, n_positions=64)).eval()
    shapes = target_modules(network, "all-linear")
    assert shapes["transformer.h.0.attn.c_attn"] == (48, 16)
    adapter = random_adapter(shapes, {path: 3 for path in shapes}, scaling)
    dense = copy.deepcopy(network)
    for path, factors in adapter.items():
        dense.get_submodule(path).weight.data += factors.delta().T.float()
    model = AdaptedModel(network, tokenizer)
    model.load(Broadcast(adapter))
    torch.testing.assert_close(logits(network), logits(dense))


def test_shared_parameters_of_the_base_count_once(model, network):
    assert network.lm_head.weight is network.model.embed_tokens.weight
    before = sum(parameter.numel() for parameter in network.parameters())
    model.load(Broadcast({"model.layers.0.self_attn.k_proj": LoraFactors(torch.zeros(2, 32), torch.zeros(16, 2), 1.0)}))
    assert model.num_parameters == before
