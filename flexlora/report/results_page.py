"""Fills the generated parts of `docs/results.md` from committed rows: one part a study, and what the page says first.

A study is a file of lines: a header of kind ``study``, then its rows. The prose around the parts is written by people;
a part lies between two comments, ``<!-- results: NAME -->`` and ``<!-- end of results: NAME -->``, and NAME is
`VERDICT` or the name of a study.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flexlora.report.capacity_tables import capacity_part
from flexlora.report.markdown_table import markdown_table
from flexlora.report.paired import DEFAULT_REFERENCE, StudyError, Summary, summary
from flexlora.report.paper_tables import paper_part
from flexlora.report.study_details import RatesRow, cost_rows, rates_table
from flexlora.report.study_figures import draws_words
from flexlora.report.study_rows import read_lines, read_rows
from flexlora.report.study_tables import MAIN_COLUMNS, main_rows
from flexlora.report.study_words import listed, p_words, verdict_sentence
from flexlora.text import bytes_text, count_text, number_text, seconds_text, signed_text

VERDICT = "verdict"
CAPACITY = "capacity"
"""The file whose rows are of facts recalled and not of a comparison."""
SUBJECTS = {"flexlora": "FlexLoRA as published", "aligned": "aligned averaging"}
"""Arm -> what the first paragraph calls it; these are judged there on every distribution."""

OPEN, CLOSE = "<!-- results: {} -->", "<!-- end of results: {} -->"


@dataclass(frozen=True)
class Study:
    """A committed study.

    Attributes:
        name: Of its part of the page, and of its file.
        machine: What it ran on, and for how long.
        in_verdict: Whether the first paragraph of the page rests on it.
    """

    name: str
    title: str
    question: str
    command: str
    config: str
    machine: str
    in_verdict: bool
    summary: Summary


def read_studies(folder: Path) -> list[Study]:
    """Return the studies of a folder, in the order of their file names.

    Raises:
        StudyError: A file has no header, or a line of it is damaged.
    """
    return [read_study(path) for path in sorted(folder.glob("*.jsonl")) if path.stem != CAPACITY]


def read_study(path: Path) -> Study:
    """Return one study.

    Raises:
        StudyError: The file has no header, its header names another study, or a line is damaged or incomplete.
    """
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        raise StudyError(f"{path}: the last line has no end, so it may be incomplete; copy the rows again")
    header = next(iter(read_lines(path)), {})
    texts = {key: header.get(key) for key in ("name", "title", "question", "command", "config", "machine")}
    wrong = [key for key, value in texts.items() if not isinstance(value, str)]
    if header.get("kind") != "study" or wrong:
        needs = "a first line of kind study with " + listed(list(texts), 9)
        raise StudyError(f"{path} needs {needs}, all text; wrong or missing: {listed(wrong, 9) or 'kind'}")
    if texts["name"] != path.stem or texts["name"] == VERDICT:
        raise StudyError(f"{path}: a study has the name of its file, other than {VERDICT}; got {texts['name']!r}")
    found = summary(read_rows(path), header.get("reference") or DEFAULT_REFERENCE)
    return Study(
        **{key: str(value) for key, value in texts.items()}, in_verdict=bool(header.get("verdict")), summary=found
    )


def filled_page(page: str, studies: Sequence[Study], capacity: Path | None = None) -> str:
    """Return a page with every generated part renewed; everything else stays.

    Args:
        page: As it is.
        studies: All that have a part on it.
        capacity: File with the rows of the capacity experiment, if there is one.

    Raises:
        StudyError: A study has no part on the page, or a part no study.
    """
    parts = {VERDICT: verdict_part(studies)} | {study.name: "\n".join(study_part(study)) for study in studies}
    if capacity is not None and capacity.exists():
        parts[CAPACITY] = "\n".join(capacity_part(capacity))
    there = re.findall(r"<!-- results: (\S+) -->", page)
    missing, unknown = [name for name in parts if there.count(name) != 1], [name for name in there if name not in parts]
    if missing or unknown:
        raise StudyError(
            f"the page needs {OPEN.format('NAME')} and {CLOSE.format('NAME')} once for each study and for {VERDICT}; "
            f"not once: {listed(missing, 9) or 'none'}; without a study: {listed(unknown, 9) or 'none'}"
        )
    for name, part in parts.items():
        opening, closing = OPEN.format(name), CLOSE.format(name)
        before, rest = page.split(opening)
        if closing not in rest:
            raise StudyError(f"{opening} has no {closing} after it; add it")
        page = f"{before}{opening}\n{part}\n{closing}{rest.split(closing, 1)[1]}"
    return page


def verdict_part(studies: Sequence[Study]) -> str:
    """Return the first paragraph: where the paper's method and ours are first, tied and behind, by the rows alone."""
    judged = [study for study in studies if study.in_verdict and study.summary.headline]
    sentences = [sentence for study in judged for arm in SUBJECTS for sentence in _standing(study, arm)]
    if not sentences:
        return "No study has been recorded that decides yet."
    return " ".join(sentences)


def _standing(study: Study, arm: str) -> Iterator[str]:
    """Yield where an arm of a study wins, ties and loses, and how it compares with the reference."""
    found, measure = study.summary, study.summary.headline
    assert measure is not None
    behind, tied, first = [], [], []
    for where in found.distributions:
        verdict = found.verdicts.get((measure.key, where))
        if verdict is None or verdict.is_early or arm not in [verdict.first, *(rival.arm for rival in verdict.rivals)]:
            continue
        if verdict.winner == arm:
            first.append(where)
        elif verdict.winner is None and arm in (verdict.first, *verdict.tied):
            tied.append(where)
        else:
            behind.append(f"{where} (there {verdict.winner or verdict.first} is ahead)")
    if not (behind or tied or first):
        return
    words = [(behind, "does not win on"), (tied, "is tied for first on"), (first, "is first on")]
    said = "; it ".join(f"{verb} {listed(places, 9)}" for places, verb in words if places)
    called = SUBJECTS[arm]
    yield f"**{called[0].upper()}{called[1:]} (`{arm}`) {said}.**"
    against = []
    for where in found.distributions:
        cell = found.cells.get((measure.key, where, arm))
        if cell is not None and cell.pairs is not None:
            size = signed_text(cell.pairs.mean, measure.digits)
            against.append(f"{size} on {where} ({p_words(cell.p_holm)}, {count_text(cell.pairs.num_pairs, 'draw')})")
    if against:
        better = "negative" if measure.lower_is_better else "positive"
        what = f"{measure.title.lower()}, {measure.unit}; {better} is better"
        yield f"Against `{found.reference}` it is at {listed(against, 9)} ({what})."


def study_part(study: Study) -> Iterator[str]:
    """Yield the lines of one study: question, verdicts, main tables, costs, reservations, and how to repeat it."""
    found, measure = study.summary, study.summary.headline
    yield f"### {study.title}"
    yield ""
    yield study.question
    if measure is None:
        yield from ("", "No test run has ended yet.")
        return
    for where in found.distributions:
        if (measure.key, where) not in found.verdicts:
            continue
        verdict = found.verdicts[measure.key, where]
        yield from ("", f"**{where}.** {verdict_sentence(verdict, measure, False)}", "")
        yield from markdown_table(MAIN_COLUMNS, [row.cells for row in main_rows(found, measure, where)])
    yield ""
    yield (
        f"{measure.title}, {measure.unit}; differences are to `{found.reference}`, paired by draw; "
        f"{draws_words(found)}. p: t-test, Holm-corrected over all arms and distributions. Flips: share of all sets of "
        "three draws whose mean difference has the other sign. Needs: draws for a power of 80 %."
    )
    yield from _costs(found)
    yield from _rates(found)
    if found.flags:
        yield from ("", "Reservations:", "")
        yield from (f"- {flag.distribution}, `{flag.arm}`: {_escaped(flag.detail)}." for flag in found.flags)
    yield from ("", f"Configuration `{study.config}`; {study.machine}. Rows: `results/{study.name}.jsonl`; made by", "")
    yield from ("```bash", study.command, "```")
    if study.in_verdict:
        yield from ("", "#### In the shape of the paper's tables", "", *paper_part(found))


def _costs(found: Summary) -> Iterator[str]:
    where = found.distributions[0]
    rows = [
        (
            row.arm,
            bytes_text(row.costs.up_bytes),
            bytes_text(row.costs.down_bytes),
            number_text(row.bytes_ratio, 2, " ×"),
            seconds_text(row.costs.server_seconds),
            seconds_text(row.costs.client_seconds),
        )
        for row in cost_rows(found, where)
    ]
    if rows:
        yield from ("", f"Cost of a run on {where}, bytes as means, times as medians:", "")
        yield from markdown_table(("arm", "up", "down", "both, to reference", "server", "clients"), rows)


def _rates(found: Summary) -> Iterator[str]:
    tables = {where: rates_table(found, where) for where in found.distributions}
    if not any(rows for _, rows in tables.values()):
        return
    yield from ("", "<details><summary>Learning rates tried</summary>", "")
    yield "Validation loss on the tuning draws, the rate that was chosen in bold."
    for where, (rates, rows) in tables.items():
        if rows:
            yield from ("", f"{where}:", "")
            columns = ("arm", *(f"{rate:g}" for rate in rates))
            yield from markdown_table(columns, [(row.arm, *_tried(row)) for row in rows])
    yield from ("", "</details>")


def _tried(row: RatesRow) -> Iterator[str]:
    for one in row.tried:
        loss = number_text(one.mean_loss if one else None, 4)
        yield f"**{loss}**" if one and one.learning_rate == row.choice.learning_rate else loss


def _escaped(words: str) -> str:
    # A reason may span lines and hold marks of Markdown.
    return re.sub(r"([\\`*_<>|])", r"\\\1", " ".join(words.split()))
