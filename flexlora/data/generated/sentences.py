"""Makes tasks that write a sentence in another grammatical form."""

from collections.abc import Iterator
from functools import partial
from random import Random

from flexlora.data.generated.clauses import draw_clause, write_clause
from flexlora.data.generated.recipe import Recipe

_FORM_WORDINGS: dict[str, tuple[str, str]] = {
    "present": ("in the present tense", "so that it happens now"),
    "past": ("in the past tense", "so that it happened before"),
    "future": ("in the future tense with will", "so that it will happen"),
    "progressive": ("with is and the ing form", "so that it is happening just now"),
    "perfect": ("with has and the participle", "as something that has been done"),
    "negative": ("in the negative with does not", "so that it denies what is said"),
    "past negative": ("in the past negative with did not", "so that it denies it for the past"),
    "question": ("as a yes-no question with does", "as a question that starts with does"),
    "past question": ("as a yes-no question with did", "as a question about the past that starts with did"),
    "passive": ("in the passive with was", "so that the thing comes first and was acted on"),
    "command": ("as a command without the name", "as an order with an exclamation mark"),
    "polite": ("as a polite request with please", "so that it asks politely"),
    "I": ("with I instead of the name", "in the first person"),
    "we": ("with we instead of the name", "in the first person plural"),
    "they": ("with they instead of the name", "in the third person plural"),
    "pronoun": ("with he or she instead of the name", "with a pronoun for the person"),
    "can": ("with can", "as something the person is able to do"),
    "must": ("with must", "as something the person has to do"),
    "may": ("with may", "as something the person is allowed to do"),
    "plural": ("with the thing in the plural", "so that there is more than one thing"),
    "wants": ("with hopes to", "as something the person hopes for"),
    "cleft": ("starting with it is and then who", "so that it stresses the person with it is"),
    "tag": ("with the word right as a question at the end", "so that it asks for agreement at the end"),
    "opposite": ("with the opposite adjective", "so that the thing has the opposite quality"),
    "bare": ("without the adjective", "so that the thing is not described"),
    "past plural": ("in the past tense with the thing in the plural", "for the past and for several things"),
    "past pronoun": ("in the past tense with he or she for the name", "for the past and with a pronoun"),
    "future negative": ("in the negative with will not", "so that it will not happen"),
    "headline": ("as a headline without the and full stop", "as a short headline"),
    "noun phrase": ("as a phrase: the thing, of, and the name", "as the thing of the person"),
}


def rewrite_recipes() -> Iterator[Recipe]:
    """Yield rewritings of a simple sentence from one grammatical form into another."""
    sources = ("present", "past", "future", "negative", "passive", "I", "question", "perfect")
    targets = list(_FORM_WORDINGS)

    for number, source in enumerate(sources):
        for place, target in enumerate(targets):
            if source == target or (source == "I" and target in ("pronoun", "cleft", "noun phrase")):
                continue
            if number > 1 and (place + number) % 3:
                continue
            # A sentence in the first person has lost the name: only forms without a name can be asked for.
            if source == "I" and target not in ("we", "they", "command", "polite"):
                continue

            how, why = _FORM_WORDINGS[target]
            start = _FORM_WORDINGS[source][0]
            yield Recipe(
                "rewrite",
                "Sentence Rewriting",
                f"{source} to {target}",
                (
                    f"The sentence is written {start}. Rewrite it {how}.",
                    f"Rewrite the sentence {how}. It is given {start}.",
                    f"Change the sentence {why}. You get it {start}.",
                ),
                partial(_rewrite, source=source, target=target),
            )


def _rewrite(rng: Random, *, source: str, target: str) -> tuple[str, str]:
    clause = draw_clause(rng)
    return write_clause(clause, source), write_clause(clause, target)
