"""Turns examples into tokens: which of them count for the loss, and what is cut from a sequence that is too long."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from operator import itemgetter
from typing import Literal

from transformers import BatchEncoding, PreTrainedTokenizerBase

from flexlora.data.answer_tokens import answer_tokens, tokenize
from flexlora.data.chat_template import PromptError, parts_of, request_of, without_special_tokens
from flexlora.data.examples import Example, Turn
from flexlora.data.prompt_templates import Rendered, Template, render

LossOn = Literal["answers", "all"]

# The label of a token that does not count for the loss, as transformers writes it.
IGNORED = -100
# Shares that stay, however long the rest is: of the window for the answer, and of the prompt's text for the input (a
# definition without its instance teaches nothing).
ANSWER_SHARE = 0.5
INPUT_SHARE = 0.25
BATCH = 512


@dataclass(frozen=True)
class EncodedExample:
    """One training sequence.

    Attributes:
        input_ids: Prompt, answer and what ends it.
        labels: As ``input_ids`` where tokens count for the loss and -100 elsewhere; the model shifts them.
        truncated: Whether anything was cut.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    truncated: bool = False


def num_labels(labels: Sequence[int]) -> int:
    """Return how many tokens of a sequence count for the loss; the first has nothing that could predict it."""
    return sum(label != IGNORED for label in labels[1:])


@dataclass(frozen=True)
class _Prompt:
    """A prompt as tokens; ``offsets`` tells for each of them which characters of the text it stands for."""

    rendered: Rendered
    ids: list[int]
    offsets: Callable[[], list[tuple[int, int]]]


def encode(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    max_length: int,
    loss_on: LossOn = "answers",
    answer_index: int = 0,
) -> EncodedExample:
    """Return the training sequence of one example; see ``encode_many``."""
    return encode_many([example], tokenizer, template, max_length, loss_on, [answer_index])[0]


def encode_many(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    max_length: int,
    loss_on: LossOn = "answers",
    answer_indices: Sequence[int] | None = None,
) -> list[EncodedExample]:
    """Return one training sequence per example, tokenized in one batch.

    The prompt has exactly the tokens that ``encode_prompt`` gives at generation (unless it had to be cut). What ends an
    answer is always in the loss: the end-of-sequence token, and with ``template: chat`` whatever the chat template
    writes there; see ``answer_tokens``. What does not fit is cut in this order: the middle of the input (a quarter of
    the prompt's text stays: many inputs end with their question), the end of the instruction, and the end of an answer
    of more than half the window.

    Args:
        max_length: Longest sequence in tokens, everything included.
        loss_on: ``answers``, or ``all`` for the prompt too.
        answer_indices: Which accepted answer of each example is trained; drawn by the caller from its own stream,
            the first ones by default.

    Raises:
        PromptError: Nothing that ends an answer, no chat template, or a window smaller than the template itself.
    """
    chosen = _chosen_answers(examples, answer_indices)
    encoded = []
    for first in range(0, len(examples), BATCH):
        part = examples[first : first + BATCH]
        prompts = list(_prompts(part, tokenizer, template))
        ids = [prompt.ids for prompt in prompts]
        answers = answer_tokens(part, chosen[first : first + BATCH], ids, tokenizer, template)
        for example, prompt, answer in zip(part, prompts, answers, strict=True):
            room = max(max_length - len(prompt.ids), int(max_length * ANSWER_SHARE))
            kept_answer = [*answer.ids[: max(room - len(answer.end), 1)], *answer.end]
            kept_prompt = _cut(example, prompt, tokenizer, template, max_length - len(kept_answer))
            hidden = [IGNORED] * len(kept_prompt) if loss_on == "answers" else kept_prompt
            num_whole = len(prompt.ids) + len(answer.ids) + len(answer.end)
            sequence = (*kept_prompt, *kept_answer)
            encoded.append(EncodedExample(sequence, (*hidden, *kept_answer), len(sequence) < num_whole))
    return encoded


def encode_prompt(
    example: Example, tokenizer: PreTrainedTokenizerBase, template: Template, max_prompt_length: int
) -> list[int]:
    """Return the tokens generation starts from, cut as in training to at most ``max_prompt_length``."""
    return encode_prompts([example], tokenizer, template, max_prompt_length)[0]


def encode_prompts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, template: Template, max_prompt_length: int
) -> list[list[int]]:
    """Return the prompt tokens of every example, tokenized in one batch."""
    return [
        _cut(example, prompt, tokenizer, template, max_prompt_length)
        for example, prompt in zip(examples, _prompts(examples, tokenizer, template), strict=True)
    ]


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that fills a batch: the padding token, else end of sequence (masked either way).

    Raises:
        PromptError: The tokenizer has neither.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    raise PromptError(
        "the tokenizer must have a padding or an end-of-sequence token to fill batches with; got neither: "
        "set `pad_token` in the tokenizer's configuration"
    )


def _chosen_answers(examples: Sequence[Example], answer_indices: Sequence[int] | None) -> list[str]:
    indices = [0] * len(examples) if answer_indices is None else answer_indices
    if len(indices) != len(examples):
        raise PromptError(
            f"answer_indices must name one answer per example; got {len(indices)} for {len(examples)} examples"
        )
    for number, (example, index) in enumerate(zip(examples, indices, strict=True)):
        if not 0 <= index < len(example.outputs):
            raise PromptError(
                f"the answer index of example {number} must be in 0..{len(example.outputs) - 1}, its accepted "
                f"answers; got {index}"
            )
    return [example.outputs[index] for example, index in zip(examples, indices, strict=True)]


def _prompts(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, template: Template) -> Iterator[_Prompt]:
    """Yield tokenized prompts, uncut; in batches, because offsets of many long texts fill gigabytes."""
    own_start = _start_ids(tokenizer)
    for first in range(0, len(examples), BATCH):
        part = examples[first : first + BATCH]
        if template == "chat":
            part = [without_special_tokens(example, tokenizer) for example in part]
        rendered = [render(example, tokenizer, template) for example in part]
        pieces = [parts_of(prompt.text) if template == "chat" else [prompt.text] for prompt in rendered]
        # A chat template writes special tokens itself, the first one included; in other texts they stay text.
        encoded = tokenize(tokenizer, list(chain(*pieces)), split_special_tokens=template != "chat")
        place = 0
        for example, prompt, own in zip(part, rendered, pieces, strict=True):
            start = own_start if template != "chat" or example.is_text_alone else []
            rows = range(place, place := place + len(own))
            ids = [token for row in rows for token in encoded["input_ids"][row]]
            yield _Prompt(prompt, start + ids, partial(_offsets, tokenizer, encoded, rows, own, len(start)))


def _start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the beginning-of-sequence token if the tokenizer puts one in front of texts."""
    start = tokenizer.bos_token_id
    return [start] if isinstance(start, int) and tokenizer("a")["input_ids"][:1] == [start] else []


def _offsets(
    tokenizer: PreTrainedTokenizerBase, encoded: BatchEncoding, rows: range, pieces: Sequence[str], num_start: int
) -> list[tuple[int, int]]:
    """Return which characters of the text each token stands for; between two pieces one character is left out."""
    if encoded.encodings is None:
        raise PromptError(
            f"cutting a long prompt needs a fast tokenizer; got {type(tokenizer).__name__}: raise data.max_length or "
            "convert the tokenizer to tokenizer.json"
        )
    offsets, shift = [(-1, -1)] * num_start, 0
    for row, piece in zip(rows, pieces, strict=True):
        offsets += [(first + shift, last + shift) for first, last in encoded.encodings[row].offsets]
        shift += len(piece) + 1
    return offsets


def _cut(
    example: Example, prompt: _Prompt, tokenizer: PreTrainedTokenizerBase, template: Template, limit: int
) -> list[int]:
    """Return the prompt's tokens without the oldest turns, middle of the input and end of the instruction that
    exceed ``limit``.
    """
    while example.history and len(prompt.ids) > limit:
        history = _without_oldest(example.history)
        if not request_of(example) and history[-1:] != example.history[-1:]:
            # What is asked is the last turn.
            break
        example = replace(example, history=history)
        prompt = next(_prompts([example], tokenizer, template))
    excess = len(prompt.ids) - limit
    if excess <= 0:
        return prompt.ids
    offsets = prompt.offsets()
    instruction = _tokens_within(offsets, prompt.rendered.instruction)
    text_input = _tokens_within(offsets, prompt.rendered.input)
    spare = max(limit - (len(prompt.ids) - len(instruction) - len(text_input)), 0)
    from_input = min(excess, max(len(text_input) - int(spare * INPUT_SHARE), 0))
    from_instruction = excess - from_input
    if from_instruction > len(instruction):
        raise PromptError(
            f"the prompt must fit into {limit} tokens and its template alone needs more; raise data.max_length"
        )
    first_cut = text_input.start + (len(text_input) - from_input + 1) // 2
    return (
        prompt.ids[: instruction.stop - from_instruction]
        + prompt.ids[instruction.stop : first_cut]
        + prompt.ids[first_cut + from_input :]
    )


def _without_oldest(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Return the turns without the oldest question and all that followed it; what the system said goes last."""
    roles = [turn[0] for turn in turns]
    first = next((index for index, role in enumerate(roles) if role != "system"), 0)
    stop = next((index for index in range(first + 1, len(roles)) if roles[index] == "user"), len(roles))
    if roles[first] == "system":
        return turns[1:]
    return turns[:first] + tuple(turn for turn in turns[first:stop] if turn[0] == "system") + turns[stop:]


def _tokens_within(offsets: list[tuple[int, int]], part: tuple[int, int]) -> range:
    """Return the tokens that stand for characters of ``part`` only; offsets never go backwards."""
    first = bisect_left(offsets, part[0], key=itemgetter(0))
    last = bisect_right(offsets, part[1], key=itemgetter(1))
    return range(first, max(first, last))
