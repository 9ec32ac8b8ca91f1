"""Names of PEFT's files, as stock PEFT writes and matches them."""

import pytest
from safetensors.torch import load_file
from transformers import PreTrainedModel

from flexlora.adapters.peft_format import WEIGHTS_FILE, factor_keys, is_expert


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("target", ["q_proj", "embed_tokens"])
def test_factors_have_the_keys_that_stock_peft_gives_them(network: PreTrainedModel, save, target: str) -> None:
    folder = save(network, r=2, target_modules=[target])
    paths = [name for name, _ in network.named_modules() if name.endswith(target)]
    keys = {key for path in paths for key in factor_keys(path, target == "embed_tokens")}
    assert keys == load_file(folder / WEIGHTS_FILE).keys()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("model.layers.0.mlp.experts.3.up_proj", True),
        ("experts.0.w1", True),
        ("model.layers.0.mlp.shared_experts.up_proj", False),
        ("model.layers.0.mlp.experts.gate", False),
        ("model.layers.0.mlp.up_proj", False),
    ],
)
def test_an_expert_is_a_numbered_part_of_experts(path: str, expected: bool) -> None:
    assert is_expert(path) == expected
