import copy
import json
import stat

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import save_file

from flexlora.adapters.folder import read_adapter
from flexlora.adapters.peft_format import AdapterError
from flexlora.adapters.write import write_adapter
from flexlora.federation.messages import Broadcast
from flexlora.lora.factors import LoraFactors, Scaling
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.base_model import target_modules

# Stock PEFT asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOKENS = torch.tensor([[1, 40, 50, 60, 70, 80], [1, 90, 33, 20, 10, 200]])


def logits(network):
    with torch.no_grad():
        return network(input_ids=TOKENS).logits


@pytest.fixture
def adapter(network, random_adapter):
    """Ranks 1 to 12, every fourth module missing, scalings that are no round numbers."""
    shapes = target_modules(network, "all-linear")
    ranks = {path: 1 + (5 * index) % 12 for index, path in enumerate(shapes) if index % 4}
    return random_adapter(shapes, ranks, Scaling("rslora", 3.7))


def test_stock_peft_loads_the_folder_and_computes_the_same(network, tokenizer, adapter, tmp_path):
    write_adapter(tmp_path / "adapter", adapter, "base")
    with torch.no_grad():
        stock = logits(PeftModel.from_pretrained(copy.deepcopy(network), tmp_path / "adapter"))
    base = logits(network)
    model = AdaptedModel(network, tokenizer)
    model.load(Broadcast(adapter))
    torch.testing.assert_close(logits(model.network), stock)
    assert (stock - base).abs().max() > 0.1


def test_every_layer_of_stock_peft_has_the_rank_of_its_module_and_no_other(network, adapter, tmp_path):
    write_adapter(tmp_path / "adapter", adapter, "base", ranks="exact")
    loaded = PeftModel.from_pretrained(network, tmp_path / "adapter").base_model.model
    ranks = {
        name: (layer.r["default"], layer.scaling["default"])
        for name, layer in loaded.named_modules()
        if hasattr(layer, "lora_A")
    }
    assert {name: rank for name, (rank, _) in ranks.items()} == {path: own.rank for path, own in adapter.items()}
    # One lora_alpha for all: what is left of a scaling is in the factors.
    assert len({rank * scaling for rank, scaling in ranks.values()}) == 1
    for path, factors in adapter.items():
        layer = loaded.get_submodule(path)
        A, B = (weights["default"].weight.detach().double() for weights in (layer.lora_A, layer.lora_B))
        torch.testing.assert_close(ranks[path][1] * B @ A, factors.delta(), rtol=1e-5, atol=1e-6)


def test_patterns_match_one_module_even_when_another_ends_like_it(tmp_path):
    shared = {"proj": 2, "deep.proj": 3, "a.deep.proj": 4, "aXdeep.proj": 5}
    adapter = {path: LoraFactors(torch.ones(rank, 4), torch.ones(6, rank), 8.0 / rank) for path, rank in shared.items()}
    network = torch.nn.Module()
    for path in shared:
        *parents, name = path.split(".")
        owner = network
        for parent in parents:
            if not hasattr(owner, parent):
                owner.add_module(parent, torch.nn.Module())
            owner = owner.get_submodule(parent)
        owner.add_module(name, torch.nn.Linear(4, 6))
    write_adapter(tmp_path / "adapter", adapter, "base", ranks="exact")
    config = LoraConfig.from_pretrained(tmp_path / "adapter")
    injected = inject_adapter_in_model(config, network)
    assert {path: injected.get_submodule(path).r["default"] for path in shared} == shared


@pytest.mark.parametrize("alpha", [16.0, 5.0])
def test_with_one_whole_alpha_what_is_written_reads_back_exactly(network, random_adapter, alpha, tmp_path):
    shapes = target_modules(network, "all-linear")
    ranks = {path: 3 + index % 3 for index, path in enumerate(shapes)}
    for layout, own in (("uniform", dict.fromkeys(shapes, 6)), ("exact", ranks)):
        adapter = random_adapter(shapes, own, Scaling("constant_alpha", alpha))
        write_adapter(tmp_path / layout, adapter, "base", ranks=layout)
        read = read_adapter(tmp_path / layout)
        assert list(read) == sorted(adapter)
        for path, factors in adapter.items():
            assert torch.equal(read[path].A, factors.A)
            assert torch.equal(read[path].B, factors.B)
            assert read[path].scaling == factors.scaling


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_folder_written_by_stock_peft_is_read(network, tokenizer, use_rslora, tmp_path):
    config = LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"layers.1.mlp.down_proj": 9},
        alpha_pattern={"down_proj": 5},
        use_rslora=use_rslora,
        init_lora_weights=False,
    )
    stock = get_peft_model(copy.deepcopy(network), config).eval()
    stock.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert adapter["model.layers.1.mlp.down_proj"].rank == 9
    model = AdaptedModel(network, tokenizer)
    model.load(Broadcast(adapter))
    torch.testing.assert_close(logits(model.network), logits(stock))


def test_equal_adapters_give_equal_bytes_and_whole_numbers_stay_whole(adapter, random_adapter, tmp_path):
    for name in ("one", "other"):
        write_adapter(tmp_path / name, dict(reversed(adapter.items())) if name == "other" else adapter, "base")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()
    paper = random_adapter(
        {"a": (3, 2), "b": (3, 2), "c": (3, 2)}, {"a": 30, "b": 200, "c": 30}, Scaling("constant_alpha", 16.0)
    )
    write_adapter(tmp_path / "paper", paper, "base", ranks="exact")
    config = json.loads((tmp_path / "paper" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (30, {"^b": 200})
    assert (config["lora_alpha"], config["alpha_pattern"]) == (16, {})
    assert {path: factors.scaling for path, factors in read_adapter(tmp_path / "paper").items()} == {
        path: factors.scaling for path, factors in paper.items()
    }


def test_an_adapter_is_replaced_and_other_folders_are_not(adapter, tmp_path):
    target = tmp_path / "adapter"
    write_adapter(target, adapter, "base")
    path = next(iter(adapter))
    write_adapter(target, {path: adapter[path]}, "base")
    assert set(read_adapter(target)) == {path}
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(AdapterError, match="it holds other files"):
        write_adapter(other, adapter, "base")
    with pytest.raises(AdapterError, match="needs at least one module"):
        write_adapter(target, {}, "base")


def test_an_interrupted_write_leaves_no_half_of_a_folder(adapter, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError("disk full")

    monkeypatch.setattr("flexlora.adapters.write.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        write_adapter(tmp_path / "adapter", adapter, "base")
    assert list(tmp_path.iterdir()) == []


def test_folders_made_for_a_write_that_fails_go_and_others_stay(adapter, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError("disk full")

    (tmp_path / "mine").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr("flexlora.adapters.write.save_file", fail)
        for folder in ("mine/adapter", "mine/new/deep/adapter", "new/adapter"):
            with pytest.raises(OSError, match="disk full"):
                write_adapter(tmp_path / folder, adapter, "base")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]
    write_adapter(tmp_path / "mine" / "new" / "adapter", adapter, "base")
    assert set(read_adapter(tmp_path / "mine" / "new" / "adapter")) == set(adapter)


def test_experts_decide_the_rank_that_needs_no_pattern(random_adapter, tmp_path):
    ranks = {f"layers.0.self_attn.{name}": 2 for name in "qkvo"} | {"layers.0.mlp.experts.3.up_proj": 5}
    adapter = random_adapter(dict.fromkeys(ranks, (6, 8)), ranks, Scaling("constant_alpha", 10.0))
    write_adapter(tmp_path / "adapter", adapter, "base", ranks="exact")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], len(config["rank_pattern"])) == (5, 4)
    assert {path: factors.rank for path, factors in read_adapter(tmp_path / "adapter").items()} == ranks


def test_everyone_whom_the_umask_allows_can_read_the_folder(adapter, tmp_path):
    write_adapter(tmp_path / "adapter", adapter, "base")
    (tmp_path / "probe").write_text("")
    expected = stat.S_IMODE((tmp_path / "probe").stat().st_mode)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "adapter").iterdir()} == {expected}


def test_a_small_dtype_on_disk_rounds_once(random_adapter, tmp_path):
    shapes = {"a": (6, 8), "b": (4, 8)}
    adapter = random_adapter(shapes, {"a": 2, "b": 3}, Scaling("constant_alpha", 10.0))
    write_adapter(tmp_path / "adapter", adapter, "base", dtype="bfloat16", ranks="exact")
    for path, factors in read_adapter(tmp_path / "adapter").items():
        assert torch.equal(factors.A, adapter[path].A.bfloat16())
    # Scaled in float64, rounded once.
    write_adapter(tmp_path / "uniform", adapter, "base", dtype="bfloat16")
    factors = read_adapter(tmp_path / "uniform")["a"]
    assert torch.equal(factors.A[:2], (adapter["a"].A.double() * 5.0**0.5).bfloat16())


def test_numbers_that_a_type_cannot_hold_are_refused(tmp_path):
    adapter = {"layer": LoraFactors(torch.full((1, 3), 1e5), torch.ones(2, 1), 1.0)}
    with pytest.raises(AdapterError, match=r"layer\.lora_A\.weight must be within 7e.04 for float16; use a type that"):
        write_adapter(tmp_path / "adapter", adapter, "base", dtype="float16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scaling", [float("nan"), float("inf"), -float("inf")])
def test_a_scaling_that_is_no_finite_number_is_refused(tmp_path, scaling):
    adapter = {
        "fine": LoraFactors(torch.ones(1, 3), torch.ones(2, 1), 1.0),
        "layer": LoraFactors(torch.ones(1, 3), torch.ones(2, 1), scaling),
    }
    with pytest.raises(AdapterError, match=f"the scaling of layer must be a finite number; got {scaling}"):
        write_adapter(tmp_path / "adapter", adapter, "base")
    assert list(tmp_path.iterdir()) == []


def test_a_type_that_adapters_are_not_written_in_is_refused(tmp_path):
    adapter = {"layer": LoraFactors(torch.ones(1, 3), torch.ones(2, 1), 1.0)}
    with pytest.raises(AdapterError, match="dtype must be one of float32, bfloat16, float16; got int8"):
        write_adapter(tmp_path / "adapter", adapter, "base", dtype="int8")
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot_be_read_are_explained(adapter, tmp_path):
    with pytest.raises(AdapterError, match="must be a PEFT adapter folder"):
        read_adapter(tmp_path)
    target = tmp_path / "adapter"
    write_adapter(target, adapter, "base")
    config = json.loads((target / "adapter_config.json").read_text())
    for change, message in (
        ({"peft_type": "IA3"}, "peft_type must be LORA; got IA3"),
        ({"use_dora": True}, "it sets use_dora: DoRA rescales"),
    ):
        (target / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(AdapterError, match=message):
            read_adapter(target)
    (target / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="must be JSON"):
        read_adapter(target)
    (target / "adapter_config.json").write_text(json.dumps(config))
    save_file({"base_model.model.a.lora_A.weight": torch.ones(2, 3)}, target / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="a must have both lora_A and lora_B"):
        read_adapter(target)
    embedding = {"lora_embedding_A": torch.ones(2, 3), "lora_embedding_B": torch.ones(4, 2)}
    save_file(
        {f"base_model.model.a.{name}": factor for name, factor in embedding.items()},
        target / "adapter_model.safetensors",
    )
    (target / "adapter_config.json").write_text(json.dumps(config | {"r": 2, "rank_pattern": {}}))
    with pytest.raises(AdapterError, match="only LoRA factors of linear modules"):
        read_adapter(target)
    (target / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(AdapterError, match="not a whole safetensors file"):
        read_adapter(target)
