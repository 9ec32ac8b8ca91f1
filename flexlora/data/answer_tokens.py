"""Turns answers into tokens, and says what ends them: the end of the sequence, or what a chat template writes there."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import BatchEncoding, PreTrainedTokenizerBase

from flexlora.data.chat_template import PromptError, TurnFrame, conversation_text, special_tokens, turn_frame
from flexlora.data.examples import Example
from flexlora.data.prompt_templates import Template


@dataclass(frozen=True)
class AnswerTokens:
    """An answer that follows its prompt.

    Attributes:
        ids: Of the answer; may be cut at their end.
        end: What ends it, and whatever the template writes behind that.
    """

    ids: list[int]
    end: list[int]


def answer_tokens(
    examples: Sequence[Example],
    answers: Sequence[str],
    prompts: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
) -> list[AnswerTokens]:
    """Return the tokens of each answer.

    With ``template: chat`` they are what the rendered conversation has behind the prompt, up to its end token; a
    template without one gets the end of the sequence. Otherwise the answer is tokenized apart from its prompt and the
    end of the sequence follows.

    Args:
        examples: Asked.
        answers: One of each.
        prompts: Tokens of each prompt, uncut.
        tokenizer: Makes the tokens.
        template: Of the prompts.

    Raises:
        PromptError: There is no end-of-sequence token and the template has no end either, or it refuses the turns.
    """
    if template != "chat":
        # In other people's texts, what looks like a special token stays text.
        plain = tokenize(tokenizer, answers, split_special_tokens=True)["input_ids"]
        return [AnswerTokens(ids, [_end_of_sequence(tokenizer)]) for ids in plain]
    frame = turn_frame(tokenizer)
    texts = [
        answer if example.is_text_alone else conversation_text(example, answer, tokenizer)
        for example, answer in zip(examples, answers, strict=True)
    ]
    whole = tokenize(tokenizer, texts, split_special_tokens=False)["input_ids"]
    special = tuple(special_tokens(tokenizer).values())
    found = []
    for example, answer, prompt, ids in zip(examples, answers, prompts, whole, strict=True):
        if example.is_text_alone:
            plain = tokenize(tokenizer, [answer], split_special_tokens=True)["input_ids"][0]
            found.append(AnswerTokens(plain, [_end_of_sequence(tokenizer)]))
        elif ids[: len(prompt)] == list(prompt) and not any(token in answer for token in special):
            found.append(_ended(ids[len(prompt) :], frame, tokenizer))
        else:
            found.append(_framed(answer, frame, tokenizer))
    return found


def end_token(tokenizer: PreTrainedTokenizerBase, template: Template) -> int | None:
    """Return the token that ends an answer besides the end of the sequence; None if there is no other.

    Raises:
        PromptError: ``template`` is ``chat`` and there is no chat template.
    """
    return turn_frame(tokenizer).end if template == "chat" else None


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, split_special_tokens: bool) -> BatchEncoding:
    """Return the tokens of texts, without what the tokenizer puts in front of them.

    Args:
        tokenizer: Makes the tokens.
        texts: Any number.
        split_special_tokens: Whether what looks like a special token is text.
    """
    return tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=split_special_tokens,
        return_attention_mask=False,
        verbose=False,
    )


def _framed(answer: str, frame: TurnFrame, tokenizer: PreTrainedTokenizerBase) -> AnswerTokens:
    """Return an answer in what a template writes around every answer, its own text never read as special tokens."""
    before, after = tokenize(tokenizer, [frame.before, frame.after], split_special_tokens=False)["input_ids"]
    plain = tokenize(tokenizer, [answer], split_special_tokens=True)["input_ids"][0]
    ended = _ended(after, frame, tokenizer)
    return AnswerTokens([*before, *plain, *ended.ids], ended.end)


def _ended(ids: list[int], frame: TurnFrame, tokenizer: PreTrainedTokenizerBase) -> AnswerTokens:
    """Return tokens split before the last end of a turn in them, or with the end of the sequence behind them."""
    if frame.end is None or frame.end not in ids:
        return AnswerTokens(ids, [_end_of_sequence(tokenizer)])
    place = len(ids) - 1 - ids[::-1].index(frame.end)
    return AnswerTokens(ids[:place], ids[place:])


def _end_of_sequence(tokenizer: PreTrainedTokenizerBase) -> int:
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise PromptError(
            "the tokenizer must have an end-of-sequence token, or generation cannot learn to stop; got none: "
            "set `eos_token` in the tokenizer's configuration"
        )
    return end
