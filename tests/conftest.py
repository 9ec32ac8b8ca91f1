"""A tiny random Llama and a byte-level tokenizer, both made in memory."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from flexlora.data.prompts import EncodedExample
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling
from flexlora.model import AdaptedModel

PAD, BOS, EOS = 0, 1, 2


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what runs leave for later ones apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """One token per byte, so that any text round-trips."""
    vocabulary = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(vocabulary)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )


@pytest.fixture
def make_network() -> Callable[..., PreTrainedModel]:
    """Returns a maker of Llamas with grouped-query attention and a non-square MLP, always the same weights."""

    def make(dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa") -> PreTrainedModel:
        config = LlamaConfig(
            vocab_size=259,
            hidden_size=32,
            intermediate_size=56,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.2,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation=attn_implementation)
        return network.eval()

    return make


@pytest.fixture
def network(make_network: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return make_network()


@pytest.fixture
def model(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> AdaptedModel:
    return AdaptedModel(network, tokenizer)


@pytest.fixture(scope="session")
def scaling() -> Scaling:
    return Scaling("constant_alpha", 16.0)


@pytest.fixture(scope="session")
def random_adapter() -> Callable[..., AdapterState]:
    """Returns a maker of adapters that change something: neither factor is zero."""

    def make(
        shapes: dict[str, tuple[int, int]], ranks: dict[str, int], scaling: Scaling, seed: int = 0
    ) -> AdapterState:
        generator = torch.Generator().manual_seed(seed)
        return {
            path: LoraFactors(
                0.3 * torch.randn(rank, shapes[path][1], generator=generator),
                0.3 * torch.randn(shapes[path][0], rank, generator=generator),
                scaling(rank),
            )
            for path, rank in sorted(ranks.items())
        }

    return make


@pytest.fixture(scope="session")
def make_examples() -> Callable[..., list[EncodedExample]]:
    """Returns a maker of examples of random tokens; prompts and answers of different lengths."""

    def make(num_examples: int, seed: int = 0, longest: int = 30) -> list[EncodedExample]:
        rng = np.random.default_rng(seed)
        examples: list[EncodedExample] = []
        for _ in range(num_examples):
            prompt, answer = (rng.integers(3, 259, rng.integers(2, longest)).tolist() for _ in range(2))
            examples.append(EncodedExample((1, *prompt, *answer, 2), (*[-100] * (1 + len(prompt)), *answer, 2)))
        return examples

    return make
