"""Any runs on one page: arms over seeds, paired differences, falls, and no file that is not its own."""

import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from scipy import stats

from flexlora import FlexLoraError
from flexlora.report.run_differences import run_rows, seed_rows
from flexlora.report.run_folder import RunFolder, read_run
from flexlora.report.run_settings import arms_of, differing_settings
from flexlora.report.runs_page import summary_of, write_runs_page
from flexlora.rounds.records import RoundRecord, append_record, read_manifest, write_manifest


@pytest.fixture
def runs(whole_run: Path, records: list[RoundRecord], tmp_path: Path) -> dict[str, Path]:
    """Two methods with seeds 1 to 3; the second is behind by 1, 2 and 4 points, and fell from a good round."""
    made = {}
    for place, behind in enumerate((1.0, 2.0, 4.0), start=1):
        for method in ("plain", "other"):
            folder = Path(shutil.copytree(whole_run, tmp_path / f"{method}-{place}"))
            rate = 0.1 if method == "plain" else 0.2
            (folder / "config.yaml").write_text(f"seed: {place}\nmethod: {{name: {method}}}\nrate: {rate}\n")
            manifest = read_manifest(folder / "manifest.json")
            assert manifest
            hashes = {"unseen": f"unseen of seed {place}"}
            changed = {"seed": place, "method": method, "data_hashes": hashes}
            write_manifest(folder / "manifest.json", manifest.model_copy(update=changed))
            last = records[12].evaluation
            assert last
            lower = last.unseen.rouge_l - (behind if method == "other" else 0)
            tasks = {
                task: one.model_copy(update={"rouge_l": one.rouge_l - (behind if method == "other" else 0)})
                for task, one in last.tasks.items()
            }
            unseen = last.unseen.model_copy(update={"rouge_l": lower})
            ended = last.model_copy(update={"unseen": unseen, "tasks": tasks})
            append_record(
                folder / "records.jsonl", records[12].model_copy(update={"server_round": 13, "evaluation": ended})
            )
            made[folder.name] = folder
    return made


def read(runs: dict[str, Path]) -> dict[str, RunFolder]:
    return {name: read_run(folder) for name, folder in runs.items()}


def test_runs_that_differ_in_the_seed_alone_are_one_arm(runs: dict[str, Path]) -> None:
    arms = arms_of(read(runs))
    assert [(arm.name, arm.runs) for arm in arms] == [
        ("plain", {1: "plain-1", 2: "plain-2", 3: "plain-3"}),
        ("other", {1: "other-1", 2: "other-2", 3: "other-3"}),
    ]


def test_the_same_run_twice_is_an_arm_of_its_own_and_so_is_one_without_settings(runs: dict[str, Path]) -> None:
    read_runs = {"a": read_run(runs["plain-1"]), "b": read_run(runs["plain-1"])}
    assert [list(arm.runs.values()) for arm in arms_of(read_runs)] == [["a"], ["b"]]
    nested = "".join(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in pairwise("abcdefghi"))
    bomb = f"a: &a [1, 2]\n{nested}".encode()
    for damage in (b"{", b"seed: 2024-13-45\n", b"- 1\n", b"[" * 5000, b"seed: \xff\xfe\n", bomb):
        (runs["plain-1"] / "config.yaml").write_bytes(damage)
        assert len(arms_of({"x": read_run(runs["plain-1"]), "y": read_run(runs["plain-2"])})) == 2


def test_differences_over_seeds_are_those_of_a_paired_t_test(runs: dict[str, Path]) -> None:
    found = read(runs)
    (rouge, loss) = seed_rows(found, arms_of(found))
    assert (rouge.arm, rouge.first, list(rouge.seeds)) == ("other", "plain", [1, 2, 3])
    expected = stats.ttest_rel([-1.0, -2.0, -4.0], [0.0, 0.0, 0.0])
    interval = expected.confidence_interval(0.95)
    assert (rouge.pairs.mean, rouge.pairs.p) == (pytest.approx(-7 / 3), pytest.approx(float(expected.pvalue)))
    assert (rouge.pairs.low, rouge.pairs.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert loss.pairs.mean == 0
    assert summary_of(list(found.values()))["headline"].startswith(
        "other ends 2.3 points of ROUGE-L below plain (95 % interval −6.1 to +1.5 over 3 seeds, which includes zero"
    )


def test_runs_of_other_tasks_have_no_difference(runs: dict[str, Path]) -> None:
    found = read(runs)
    rows = {row.name: row for row in run_rows(found, arms_of(found))}
    first = rows["plain-1"]
    assert first.to_first is None and rows["plain-2"].to_first is None
    shifted = rows["other-1"].to_first
    # Every task is a point lower, so every resample is.
    assert shifted and (shifted.value, shifted.low, shifted.high) == tuple([pytest.approx(-1.0)] * 3)


def test_the_settings_that_differ_are_listed_without_the_seed(runs: dict[str, Path]) -> None:
    assert differing_settings(read(runs)) == [
        ("method.name", ["plain", "other"] * 3),
        ("rate", ["0.1", "0.2"] * 3),
    ]


def test_the_page_says_who_fell_and_who_is_ahead(runs: dict[str, Path], tmp_path: Path) -> None:
    text = write_runs_page(list(runs.values()), tmp_path / "out" / "page.html").read_text(encoding="utf-8")
    words = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text))
    assert "6 runs compared" in words and "other-3 fell by 4.0 from its best" in words
    assert "default-src 'none'" in text and not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)


def test_names_of_runs_and_settings_cannot_break_out(runs: dict[str, Path], tmp_path: Path) -> None:
    evil = Path(shutil.copytree(runs["plain-1"], tmp_path / "<img src=x onerror=y>"))
    (evil / "config.yaml").write_text("seed: 1\n'</script><script>x()</script>': '\"><b>'\n")
    text = write_runs_page([runs["plain-2"], evil], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<img" not in text and "<script>x()" not in text and "<b>'" not in text


def test_a_comparison_replaces_nothing_but_a_comparison(runs: dict[str, Path], tmp_path: Path) -> None:
    folders = list(runs.values())[:2]
    page = write_runs_page(folders, tmp_path / "page.html")
    assert write_runs_page(folders, page) == page
    (tmp_path / "notes.html").write_text("mine")
    (folders[0] / "report.html").write_text("the run's own")
    for out, message in (
        (folders[0] / "report.html", "never goes into the folder of a run"),
        (folders[0] / "other.html", "never goes into the folder of a run"),
        (tmp_path / "notes.html", "replaces an earlier comparison and nothing else"),
        (tmp_path / "page.txt", "a file that ends in .html"),
        (tmp_path, "a file that ends in .html"),
    ):
        with pytest.raises(FlexLoraError, match=message):
            write_runs_page(folders, out)
    assert (folders[0] / "report.html").read_text() == "the run's own"
    assert (tmp_path / "notes.html").read_text() == "mine"
