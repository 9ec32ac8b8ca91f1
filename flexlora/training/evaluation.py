"""How good a model is on generated text: ROUGE-L, exact match and answer loss, per task and over tasks."""

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from rouge_score import rouge_scorer

from flexlora.data.examples import Example
from flexlora.data.prompt_templates import Template
from flexlora.data.prompts import encode_many, encode_prompts, num_labels, padding_token
from flexlora.federation.messages import Broadcast
from flexlora.training.adapted_model import AdaptedModel

# Bounds the memory of a batch of long sequences; batches of short ones are bounded by their number of rows.
_MOST_BATCH_TOKENS = 65_536


# Scripts written without spaces, where every character (with its marks) counts as a word: Thai, Lao, Myanmar, Khmer,
# kana, and Han with its extensions.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff]"
)


@dataclass(frozen=True)
class Score:
    """Quality on the examples of one task, or over several tasks.

    Attributes:
        rouge_l: ROUGE-L F-measure of the generated answers, the best over the accepted ones, 0 to 100.
        exact_match: Share of generated answers that equal an accepted one up to case and white space, 0 to 100.
        loss: Cross-entropy in nats per token of the first accepted answer, end of sequence included.
        num_examples: Examples scored.
        num_tasks: Tasks they belong to.
    """

    rouge_l: float
    exact_match: float
    loss: float
    num_examples: int
    num_tasks: int


def combine(scores: Sequence[Score], *, weighted: bool = True) -> Score:
    """Return the mean of scores; of none, zeros with ``num_examples`` 0.

    Args:
        scores: Of tasks, or already means themselves.
        weighted: Whether every example counts the same; otherwise every score does.
    """
    weights = [score.num_examples if weighted else 1 for score in scores]
    total = sum(weights)

    def mean(values: Sequence[float]) -> float:
        return sum(weight * value for weight, value in zip(weights, values, strict=True)) / total if total else 0.0

    return Score(
        rouge_l=mean([score.rouge_l for score in scores]),
        exact_match=mean([score.exact_match for score in scores]),
        loss=mean([score.loss for score in scores]),
        num_examples=sum(score.num_examples for score in scores),
        num_tasks=sum(score.num_tasks for score in scores),
    )


def evaluate(
    model: AdaptedModel,
    adapter: Broadcast | None,
    tasks: Mapping[str, Sequence[Example]],
    *,
    template: Template,
    max_length: int,
    max_new_tokens: int,
    batch_size: int = 64,
) -> dict[str, Score]:
    """Return the score of each task that has examples, in the order given; deterministic.

    Examples of all tasks are decoded together, in batches of similar length.

    Args:
        model: Serves as the base; what was loaded before does not matter.
        adapter: What to add to the base; None scores the base alone.
        tasks: Task -> its examples.
        template: How prompts are written; the one used in training.
        max_length: Longest sequence in tokens, prompt and generated answer together.
        max_new_tokens: Longest generated answer.
        batch_size: Most sequences decoded at once.
    """
    examples = [example for task in tasks.values() for example in task]
    if adapter is not None:
        model.load(adapter)
    with model.without_adapter() if adapter is None else nullcontext():
        answers = generate_answers(model, examples, template, max_length, max_new_tokens, batch_size)
        losses = _losses(model, examples, template, max_length, batch_size)
    scores: dict[str, Score] = {}
    start = 0
    for task, members in tasks.items():
        part = slice(start, start + len(members))
        if members:
            scores[task] = _score(members, answers[part], losses[part])
        start = part.stop
    return scores


def answer_loss(
    model: AdaptedModel,
    adapter: Broadcast | None,
    examples: Sequence[Example],
    template: Template,
    max_length: int,
    batch_size: int = 64,
) -> float:
    """Return nats per token of the first accepted answers, without generating; see ``evaluate`` for the arguments."""
    if adapter is not None:
        model.load(adapter)
    with model.without_adapter() if adapter is None else nullcontext():
        losses = _losses(model, examples, template, max_length, batch_size)
    return sum(nats for nats, _ in losses) / max(1, sum(tokens for _, tokens in losses))


def _score(examples: Sequence[Example], answers: Sequence[str], losses: Sequence[tuple[float, int]]) -> Score:
    pairs = list(zip(examples, answers, strict=True))
    return Score(
        rouge_l=100 * sum(rouge_l(answer, example.outputs) for example, answer in pairs) / len(pairs),
        exact_match=100 * sum(is_exact_match(answer, example.outputs) for example, answer in pairs) / len(pairs),
        loss=sum(nats for nats, _ in losses) / max(1, sum(tokens for _, tokens in losses)),
        num_examples=len(pairs),
        num_tasks=1,
    )


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """Return the ROUGE-L F-measure (0 to 1) of ``answer``, the best over ``references``.

    As rouge-score computes it without stemming: exactly its score for ASCII text. Its own tokenizer deletes everything
    else; here words of any script count, and single characters in scripts that write no spaces. A reference
    without any word, such as ``:-)``, scores 1 for an exact match and 0 otherwise.
    """
    best = _ROUGE.score_multi(references, answer)["rougeL"].fmeasure
    wordless = [reference for reference in references if not _WORDS.tokenize(reference)]
    return 1.0 if is_exact_match(answer, wordless) else float(best)


def is_exact_match(answer: str, references: Sequence[str]) -> bool:
    """Return whether ``answer`` equals a reference, ignoring case and the amount of white space."""
    return _normalised(answer) in {_normalised(reference) for reference in references}


def _normalised(text: str) -> str:
    return " ".join(text.casefold().split())


class _UnicodeWords:
    """Splits text into lower-case words for rouge-score, which asks for an object with this method."""

    def tokenize(self, text: str) -> list[str]:
        """Return runs of letters and digits of any script, with the marks that belong to them."""
        text = text.lower()
        if text.isascii():
            return re.findall("[a-z0-9]+", text)
        return list(_words(unicodedata.normalize("NFKC", text)))


def _words(text: str) -> Iterator[str]:
    word = ""
    for character in text:
        kind = unicodedata.category(character)
        if kind == "Cf":
            # Joiners inside words of Persian or Hindi change their look only.
            continue
        is_mark = kind[0] == "M" and word
        if not is_mark and word and (not character.isalnum() or _UNSPACED.match(character) or _UNSPACED.match(word)):
            yield word
            word = ""
        if is_mark or character.isalnum():
            word += character
    if word:
        yield word


_WORDS = _UnicodeWords()


_ROUGE = rouge_scorer.RougeScorer(["rougeL"], tokenizer=_WORDS)


def generate_answers(
    model: AdaptedModel,
    examples: Sequence[Example],
    template: Template,
    max_length: int,
    max_new_tokens: int,
    batch_size: int = 64,
) -> list[str]:
    """Return the answer that the model, as it is loaded, generates for each example by greedy decoding.

    Args:
        max_length: Longest sequence; prompts are cut to leave room for ``max_new_tokens``, up to half of it.
        max_new_tokens: Longest answer.
        batch_size: Most prompts decoded at once.
    """
    room = max(max_length - max_new_tokens, max_length // 2)
    prompts = encode_prompts(examples, model.tokenizer, template, room)
    num_new = min(max_new_tokens, max_length - max(map(len, prompts), default=0))
    generated = generate(model, prompts, num_new, batch_size)
    return [str(model.tokenizer.decode(tokens, skip_special_tokens=True)).strip() for tokens in generated]


@torch.no_grad()
def generate(
    model: AdaptedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int = 64
) -> list[list[int]]:
    """Return the tokens that follow each prompt, always the most probable one, without the end of sequence.

    Sampling settings, penalties and the like that came with the model are not applied.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    for batch in _batches_of_similar_length(lengths, batch_size):
        for index, answer in zip(batch, _decode(model, [prompts[i] for i in batch], max_new_tokens), strict=True):
            answers[index] = answer
    return answers


def _decode(model: AdaptedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    """Return greedy continuations of one batch; a row that has ended leaves the batch."""
    width, padding, ends = max(map(len, prompts)), padding_token(model.tokenizer), _end_tokens(model)
    padded = [[padding] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    input_ids = torch.tensor(padded, device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    answers: list[list[int]] = [[] for _ in prompts]
    going, cache = answers, None
    for step in range(1, max_new_tokens + 1):
        logits, cache = model.next_logits(input_ids, mask, cache)
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
            chosen, mask = chosen[rows], mask[rows]
            cache.reorder_cache(cast("torch.LongTensor", rows))
        input_ids = chosen[:, None]
        mask = torch.cat([mask, mask.new_ones(len(kept), 1)], dim=1)
    return answers


def _end_tokens(model: AdaptedModel) -> set[int]:
    """Return the tokens that end an answer: the tokenizer's, and those of the model (chat models have several)."""
    settings = model.network.generation_config
    of_model = cast("int | list[int] | None", settings.eos_token_id if settings is not None else None)
    several = of_model if isinstance(of_model, list) else [of_model]
    return {int(token) for token in [*several, model.tokenizer.eos_token_id] if token is not None}


@torch.no_grad()
def _losses(
    model: AdaptedModel, examples: Sequence[Example], template: Template, max_length: int, batch_size: int
) -> list[tuple[float, int]]:
    """Return per example the summed loss of its first accepted answer, and its number of tokens."""
    encoded = encode_many(examples, model.tokenizer, template, max_length)
    padding = padding_token(model.tokenizer)
    losses = [(0.0, 0)] * len(encoded)
    for batch in _batches_of_similar_length([len(example.input_ids) for example in encoded], batch_size):
        rows, labels = [encoded[i].input_ids for i in batch], [encoded[i].labels for i in batch]
        for index, nats in zip(batch, model.answer_losses(rows, labels, padding).tolist(), strict=True):
            losses[index] = (nats, num_labels(encoded[index].labels))
    return losses


def _batches_of_similar_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield indices in batches, longest first, so that what does not fit into memory fails at once."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch and (len(batch) == batch_size or (len(batch) + 1) * lengths[batch[0]] > _MOST_BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
