"""Compares a generated answer with the accepted ones: ROUGE-L in any script, and exact match."""

import re
import unicodedata
from collections.abc import Iterator, Sequence

from rouge_score import rouge_scorer

# Scripts without spaces; each of their characters, with its marks, counts as a word: Thai, Lao, Myanmar, Khmer,
# kana, and Han with its extensions.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff]"
)


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """Return the ROUGE-L F-measure (0 to 1) of ``answer``, the best over ``references``.

    For ASCII text, this is what rouge-score computes without stemming. Its tokenizer drops all other text; here, words
    of any script count, and in scripts without spaces every character. A reference without a word, such as ``:-)``,
    scores 1 if matched exactly and 0 otherwise.
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
    """Splits text into lower-case words; rouge-score calls the method."""

    def tokenize(self, text: str) -> list[str]:
        """Return runs of letters and digits of any script, with their marks."""
        text = text.lower()
        if text.isascii():
            return re.findall("[a-z0-9]+", text)
        return list(_words(unicodedata.normalize("NFKC", text)))


def _words(text: str) -> Iterator[str]:
    word = ""
    for character in text:
        kind = unicodedata.category(character)
        if kind == "Cf":
            # Joiners inside Persian or Hindi words change only how they look.
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
