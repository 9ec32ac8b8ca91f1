import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from flexlora.federation.messages import Broadcast
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.base_model import target_modules
from flexlora.training.logits import answer_losses, next_logits

# Stock PEFT asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


ROWS = [[1, 40, 50, 60, 70, 80], [1, 90, 33]]
LABELS = [[-100, -100, 50, -100, 70, 80], [1, -100, 33]]


def stock_losses(network):
    """Cross-entropy by transformers itself, one row at a time."""
    with torch.no_grad():
        return torch.stack(
            [
                network(input_ids=torch.tensor([row]), labels=torch.tensor([labels])).loss
                * sum(label != -100 for label in labels[1:])
                for row, labels in zip(ROWS, LABELS, strict=True)
            ]
        )


@pytest.mark.parametrize("selection", ["all-linear", ["q_proj", "lm_head"]])
def test_losses_of_padded_rows_are_those_of_transformers_one_by_one(model, random_adapter, scaling, selection):
    shapes = target_modules(model.network, selection)
    model.load(Broadcast(random_adapter(shapes, {path: 2 for path in shapes}, scaling)))
    torch.testing.assert_close(answer_losses(model, ROWS, LABELS, 0).detach(), stock_losses(model.network))


@pytest.mark.parametrize("selection", ["all-linear", ["q_proj", "lm_head"]])
def test_the_next_logits_are_those_of_transformers(model, random_adapter, scaling, selection):
    shapes = target_modules(model.network, selection)
    model.load(Broadcast(random_adapter(shapes, {path: 2 for path in shapes}, scaling)))
    tokens = torch.tensor(ROWS[:1])
    with torch.no_grad():
        found, _ = next_logits(model, tokens, torch.ones_like(tokens), None)
        torch.testing.assert_close(found, model.network(input_ids=tokens).logits[:, -1])


def test_models_that_cap_their_logits_are_noticed_and_computed_whole(tokenizer):
    config = Gemma2Config(
        vocab_size=259,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=0.5,
        sliding_window=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Gemma2ForCausalLM(config).eval()
    model = AdaptedModel(network, tokenizer)
    torch.testing.assert_close(answer_losses(model, ROWS, LABELS, 0).detach(), stock_losses(network))
