"""Which answers a page shows: best, worst and random by the rule that it states."""

import hashlib
import io

from rich.console import Console

from flexlora.report.answer_file import AnswerRecord, ModelAnswer
from flexlora.report.shown_answers import FEDIT, answer_groups, drawn_answers
from flexlora.report.terminal import print_answers


def example(task: str, number: int, base: float, fedit: float | None, own: float) -> AnswerRecord:
    said = {"base": base, "federated": own} | ({} if fedit is None else {FEDIT: fedit})
    answers = {
        name: ModelAnswer(text=f"{name} {value}", rouge_l=value, exact_match=False) for name, value in said.items()
    }
    return AnswerRecord(task=task, number=number, prompt="p", references=["r"], answers=answers)


EXAMPLES = [example(f"t{n // 2}", n % 2, 0.0, 50.0, 10.0 * n) for n in range(12)]


def test_best_and_worst_are_the_largest_differences_to_fedit_one_a_task() -> None:
    groups = {group.title: group for group in answer_groups(EXAMPLES, [FEDIT])}
    assert [(one.task, one.gain) for one in groups["Best"].examples] == [("t5", 60.0), ("t4", 40.0), ("t3", 20.0)]
    assert [(one.task, one.gain) for one in groups["Worst"].examples] == [("t0", -50.0), ("t1", -30.0), ("t2", -10.0)]
    assert [one.model for one in groups["Best"].examples[0].answers] == [
        "Base model",
        "FedIT, smallest rank",
        "This run",
    ]


def test_random_ones_are_drawn_by_a_hash_that_anybody_can_check() -> None:
    drawn = next(group for group in answer_groups(EXAMPLES, [FEDIT]) if group.title == "Random")
    order = sorted(EXAMPLES, key=lambda one: hashlib.sha256(f"{one.task} {one.number}".encode()).hexdigest())
    assert [one.task for one in drawn.examples] == list(dict.fromkeys(one.task for one in order))[:3]


def test_without_fedit_the_run_is_compared_with_the_base() -> None:
    (best, drawn) = answer_groups([example("a", 0, 10.0, 90.0, 30.0)], [])
    assert (best.title, best.examples[0].gain, drawn.title) == ("Best", 20.0, "Random")
    assert "over the base model" in best.rule
    assert [one.style for one in best.examples[0].answers] == ["base", "federated"]


def test_without_answers_there_is_nothing_to_show_and_long_ones_are_cut() -> None:
    assert answer_groups([], [FEDIT]) == []
    unanswered = AnswerRecord(task="a", number=0, prompt="p", references=["r"])
    assert answer_groups([unanswered], [FEDIT]) == []
    long = example("a", 0, 1.0, None, 2.0).model_copy(update={"prompt": "x" * 5000})
    prompt = answer_groups([long], [])[0].examples[0].prompt
    assert len(prompt) < 1300 and "[…]" in prompt


def test_a_terminal_shows_the_drawn_ones_before_and_after_with_their_rule() -> None:
    examples, rule = drawn_answers(EXAMPLES)
    assert [answer.model for answer in examples[0].answers] == ["Base model", "This run"]
    assert "SHA-256" in rule
    assert drawn_answers([]) == ((), "")
    long = EXAMPLES[0].model_copy(update={"prompt": "Say\n\n  it " + "x " * 250, "references": ["[bold]a[/]"]})
    console = Console(width=60, file=io.StringIO())
    print_answers(console, *drawn_answers([long]))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Say it x x x" in text and "[…]" in text and "Expected    [bold]a[/]" in text
    assert max(map(len, text.splitlines())) <= 60
    pipe = Console(width=10_000, file=io.StringIO())
    print_answers(pipe, *drawn_answers([long]))
    assert max(map(len, pipe.file.getvalue().splitlines())) < 300  # type: ignore[attr-defined]
    print_answers(console, (), "nothing")
    assert console.file.getvalue() == text  # type: ignore[attr-defined]
