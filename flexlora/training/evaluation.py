"""Scores a model per task and over tasks: ROUGE-L and exact match of generated answers, and answer loss."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from flexlora.data.examples import Example
from flexlora.data.prompt_templates import Template
from flexlora.data.prompts import encode_many, num_labels, padding_token
from flexlora.federation.messages import Broadcast
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.generation import batches_of_similar_length, generate_answers
from flexlora.training.length_runs import PASS_TOKENS, cheapest_runs
from flexlora.training.logits import answer_losses
from flexlora.training.rouge import is_exact_match, rouge_l


@dataclass(frozen=True)
class Score:
    """Quality on the examples of one task, or over several tasks.

    Attributes:
        rouge_l: ROUGE-L F-measure of the generated answers, the best over the accepted ones, 0 to 100.
        exact_match: Share of generated answers that equal an accepted one up to case and white space, 0 to 100.
        loss: Cross-entropy in nats per token of the first accepted answer, with the end of sequence.
        num_examples: Examples scored.
        num_tasks: Tasks they belong to.
    """

    rouge_l: float
    exact_match: float
    loss: float
    num_examples: int
    num_tasks: int


@dataclass(frozen=True)
class Answer:
    """What a model said to one example, and how good that is.

    Attributes:
        text: As generated, without white space around it.
        rouge_l: ROUGE-L F-measure, the best over the accepted answers, 0 to 100.
        is_exact: Whether it equals an accepted one up to case and white space.
        nats: Summed cross-entropy of the first accepted answer, with the end of sequence.
        num_tokens: Tokens that ``nats`` is the sum over.
    """

    text: str
    rouge_l: float
    is_exact: bool
    nats: float
    num_tokens: int


def combine(scores: Sequence[Score], *, weighted: bool = True) -> Score:
    """Return the mean of scores; zeros if there are none.

    Args:
        scores: Of tasks, or means over tasks.
        weighted: Whether every example has the same weight; otherwise every score has.
    """
    weights = [score.num_examples if weighted else 1 for score in scores]
    total = sum(weights)

    def mean(values: Sequence[float]) -> float:
        """Return the weighted mean; 0 if there are no weights."""
        return sum(weight * value for weight, value in zip(weights, values, strict=True)) / total if total else 0.0

    return Score(
        rouge_l=mean([score.rouge_l for score in scores]),
        exact_match=mean([score.exact_match for score in scores]),
        loss=mean([score.loss for score in scores]),
        num_examples=sum(score.num_examples for score in scores),
        num_tasks=sum(score.num_tasks for score in scores),
    )


def answer_tasks(
    model: AdaptedModel,
    adapter: Broadcast | None,
    tasks: Mapping[str, Sequence[Example]],
    *,
    template: Template,
    max_length: int,
    max_new_tokens: int,
    batch_size: int = 64,
    notify: Callable[[int], None] = lambda num_answers: None,
) -> dict[str, list[Answer]]:
    """Return one answer per example of each task that has examples, in the order given; draws no random numbers.

    Examples of all tasks are decoded together, in batches of similar length.

    Args:
        model: The base; factors loaded before do not matter.
        adapter: Added to the base; None scores the base alone.
        tasks: Task -> its examples.
        template: How prompts are written, as in training.
        max_length: Longest sequence in tokens, prompt and generated answer together.
        max_new_tokens: Longest generated answer.
        batch_size: Most sequences decoded at once.
        notify: Told after each batch how many answers have been generated.
    """
    examples = [example for task in tasks.values() for example in task]
    if adapter is not None:
        model.load(adapter)
    with model.without_adapter() if adapter is None else nullcontext():
        answers = generate_answers(model, examples, template, max_length, max_new_tokens, batch_size, notify)
        losses = _losses(model, examples, template, max_length, batch_size)
    scored = iter(map(_answer, examples, answers, losses))
    return {task: [next(scored) for _ in members] for task, members in tasks.items() if members}


def score_of(answers: Sequence[Answer]) -> Score:
    """Return the score of one task from its answers, at least one."""
    return Score(
        rouge_l=sum(answer.rouge_l for answer in answers) / len(answers),
        exact_match=100 * sum(answer.is_exact for answer in answers) / len(answers),
        loss=_nats_per_token([(answer.nats, answer.num_tokens) for answer in answers]),
        num_examples=len(answers),
        num_tasks=1,
    )


def answer_loss(
    model: AdaptedModel,
    adapter: Broadcast | None,
    examples: Sequence[Example],
    template: Template,
    max_length: int,
    batch_size: int = 64,
) -> float:
    """Return nats per token of the first accepted answers; for the arguments see ``answer_tasks``."""
    if adapter is not None:
        model.load(adapter)
    with model.without_adapter() if adapter is None else nullcontext():
        losses = _losses(model, examples, template, max_length, batch_size)
    return _nats_per_token(losses)


def task_loss(
    model: AdaptedModel,
    adapter: Broadcast | None,
    tasks: Mapping[str, Sequence[Example]],
    template: Template,
    max_length: int,
    batch_size: int = 64,
) -> float:
    """Return the combined loss of ``answer_tasks``, without generating answers; 0 without examples.

    It is nats per token within a task, and the mean over tasks weighted by their examples.
    """
    examples = [example for task in tasks.values() for example in task]
    if adapter is not None:
        model.load(adapter)
    with model.without_adapter() if adapter is None else nullcontext():
        losses = iter(_losses(model, examples, template, max_length, batch_size))
    by_task = [_nats_per_token([next(losses) for _ in members]) * len(members) for members in tasks.values()]
    return sum(by_task) / max(1, len(examples))


def _nats_per_token(losses: Sequence[tuple[float, int]]) -> float:
    return sum(nats for nats, _ in losses) / max(1, sum(tokens for _, tokens in losses))


def _answer(example: Example, text: str, loss: tuple[float, int]) -> Answer:
    return Answer(text, 100 * rouge_l(text, example.outputs), is_exact_match(text, example.outputs), *loss)


@torch.no_grad()
def _losses(
    model: AdaptedModel, examples: Sequence[Example], template: Template, max_length: int, batch_size: int
) -> list[tuple[float, int]]:
    """Return per example the summed loss of its first accepted answer, and its number of tokens."""
    encoded = encode_many(examples, model.tokenizer, template, max_length)
    padding = padding_token(model.tokenizer)
    losses = [(0.0, 0)] * len(encoded)
    lengths = [len(example.input_ids) for example in encoded]
    for batch in batches_of_similar_length(lengths, batch_size):
        for run in cheapest_runs([lengths[i] for i in batch], batch_size, PASS_TOKENS.get(model.pace, 0)):
            part = batch[run]
            rows, labels = [encoded[i].input_ids for i in part], [encoded[i].labels for i in part]
            for index, nats in zip(part, answer_losses(model, rows, labels, padding).tolist(), strict=True):
                losses[index] = (nats, num_labels(encoded[index].labels))
    return losses
