"""Generates answers by greedy decoding, in batches of similar length."""

from collections.abc import Callable, Iterator, Sequence, Set
from typing import cast

import torch

from flexlora.data.answer_tokens import end_token
from flexlora.data.examples import Example
from flexlora.data.prompt_templates import Template
from flexlora.data.prompts import encode_prompts, padding_token
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.logits import next_logits
from flexlora.training.prompt_cache import read_prompts

# Bounds the memory of a batch of long sequences; the number of rows bounds batches of short ones.
_MOST_BATCH_TOKENS = 65_536


def generate_answers(
    model: AdaptedModel,
    examples: Sequence[Example],
    template: Template,
    max_length: int,
    max_new_tokens: int,
    batch_size: int = 64,
    notify: Callable[[int], None] = lambda num_answers: None,
) -> list[str]:
    """Return the answer that the model generates for each example with the factors that are loaded.

    Args:
        max_length: Longest sequence; prompts are cut to leave room for ``max_new_tokens``, at most to half of this.
        max_new_tokens: Longest answer.
        batch_size: Most prompts decoded at once.
        notify: Told after each batch how many answers there are.
    """
    room = max(max_length - max_new_tokens, max_length // 2)
    # A text that stands alone follows nothing, not even a start where the tokenizer has none.
    nothing = [padding_token(model.tokenizer)]
    prompts = [prompt or nothing for prompt in encode_prompts(examples, model.tokenizer, template, room)]
    num_new = min(max_new_tokens, max_length - max(map(len, prompts), default=0))
    end = end_token(model.tokenizer, template)
    ends = [] if end is None else [end]
    generated = generate(model, prompts, num_new, batch_size, ends, notify)
    return [str(model.tokenizer.decode(tokens, skip_special_tokens=True)).rstrip() for tokens in generated]


@torch.no_grad()
def generate(
    model: AdaptedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int = 64,
    further_ends: Sequence[int] = (),
    notify: Callable[[int], None] = lambda num_answers: None,
) -> list[list[int]]:
    """Return the most probable tokens after each prompt, one at a time, without the token that ends them.

    Sampling settings and penalties that came with the model are ignored.

    Args:
        model: With the factors that are loaded.
        prompts: Tokens, at least one each.
        max_new_tokens: Longest continuation.
        batch_size: Most prompts decoded at once.
        further_ends: Tokens that end an answer, besides those that tokenizer and model name.
        notify: Told after each batch how many answers there are.
    """
    ends = _end_tokens(model) | set(further_ends)
    answers: list[list[int]] = [[] for _ in prompts]
    lengths, done = [len(prompt) + max_new_tokens for prompt in prompts], 0
    for batch in batches_of_similar_length(lengths, batch_size, equal=not model.can_pad_left):
        decoded = _decode(model, [prompts[i] for i in batch], max_new_tokens, ends)
        for index, answer in zip(batch, decoded, strict=True):
            answers[index] = answer
        done += len(batch)
        notify(done)
    return answers


def _decode(
    model: AdaptedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, ends: Set[int]
) -> list[list[int]]:
    """Return greedy continuations of one batch; a row that has ended leaves the batch."""
    width, padding = max(map(len, prompts)), padding_token(model.tokenizer)
    padded = [[padding] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    input_ids = torch.tensor(padded, device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    answers: list[list[int]] = [[] for _ in prompts]
    going, cache = answers, None
    for step in range(1, max_new_tokens + 1):
        logits, cache = (
            read_prompts(model, input_ids, mask) if step == 1 else next_logits(model, input_ids, mask, cache)
        )
        chosen = logits.argmax(-1)
        tokens = chosen.tolist()
        kept = [row for row, token in enumerate(tokens) if token not in ends]
        for row in kept:
            going[row].append(tokens[row])
        if not kept or step == max_new_tokens:
            break
        if len(kept) < len(going):
            rows = torch.tensor(kept, device=model.device)
            going = [going[row] for row in kept]
            chosen, mask, input_ids = chosen[rows], mask[rows], input_ids[rows]
            if cache is not None:
                cache.reorder_cache(cast("torch.LongTensor", rows))
        input_ids = torch.cat([input_ids, chosen[:, None]], 1) if cache is None else chosen[:, None]
        mask = torch.cat([mask, mask.new_ones(len(kept), 1)], dim=1)
    return answers


def _end_tokens(model: AdaptedModel) -> set[int]:
    """Return the tokens that end an answer: that of the tokenizer and those of the model (chat models have several)."""
    settings = model.network.generation_config
    of_model = cast("int | list[int] | None", settings.eos_token_id if settings is not None else None)
    several = of_model if isinstance(of_model, list) else [of_model]
    return {int(token) for token in [*several, model.tokenizer.eos_token_id] if token is not None}


def batches_of_similar_length(lengths: Sequence[int], batch_size: int, *, equal: bool = False) -> Iterator[list[int]]:
    """Yield indices in batches, longest first, so that a lack of memory shows at once.

    Args:
        lengths: In tokens.
        batch_size: Most indices of a batch.
        equal: Whether a batch has one length only.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        is_full = len(batch) == batch_size or (len(batch) + 1) * lengths[batch[0] if batch else 0] > _MOST_BATCH_TOKENS
        if batch and (is_full or (equal and lengths[index] != lengths[batch[0]])):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
