"""Headlines and status, word for word."""

from pathlib import Path

from flexlora.report.headline import headline, notices, status
from flexlora.report.run_folder import read_run
from flexlora.rounds.records import RoundRecord, append_record


def test_the_headline_says_what_was_run_and_what_came_of_it(whole_run: Path) -> None:
    assert headline(read_run(whole_run)) == (
        "12 rounds of flexlora on the flexlora/tiny-llama model with 80 clients of 4 kinds of device. ROUGE-L on "
        "unseen tasks rose from 12.0 (base model alone) to 41.0: +29.0 points."
    )
    assert status(read_run(whole_run)) is None


def test_a_run_that_got_worse_says_so(whole_run: Path, records: list[RoundRecord]) -> None:
    (whole_run / "records.jsonl").unlink()
    worse = records[0].evaluation
    assert worse
    worse = worse.model_copy(update={"unseen": worse.unseen.model_copy(update={"rouge_l": 9.5})})
    append_record(whole_run / "records.jsonl", records[0])
    append_record(whole_run / "records.jsonl", records[2].model_copy(update={"evaluation": worse}))
    text = headline(read_run(whole_run))
    assert "fell from 12.0 (base model alone) to 9.5: \u22122.5 points" in text


def test_a_run_in_progress_says_how_far_it_is(running_run: Path) -> None:
    assert status(read_run(running_run)) == "Not finished: 4 of 12 rounds. The page shows what there is."
    assert "rose from 12.0 (base model alone) to 29.3" in headline(read_run(running_run))


def test_a_run_that_stopped_early_says_why(running_run: Path, records: list[RoundRecord]) -> None:
    append_record(running_run / "records.jsonl", records[5].model_copy(update={"stopped": "no progress in 3 rounds."}))
    assert status(read_run(running_run)) == "Ended early after round 5: no progress in 3 rounds."


def test_a_run_that_changed_nothing_says_so(whole_run: Path, records: list[RoundRecord]) -> None:
    (whole_run / "records.jsonl").unlink()
    append_record(whole_run / "records.jsonl", records[0])
    append_record(whole_run / "records.jsonl", records[2].model_copy(update={"evaluation": records[0].evaluation}))
    text = headline(read_run(whole_run))
    assert "ROUGE-L on unseen tasks stayed at 12.0, that of the base model alone." in text


def test_notices_are_the_warnings_and_the_notes_of_rounds(whole_run: Path) -> None:
    assert notices(read_run(whole_run)) == [
        "2 clients have fewer than 16 examples",
        "Round 5: two clients shared one name",
    ]


def test_a_run_that_fell_from_its_best_says_so(whole_run: Path, records: list[RoundRecord]) -> None:
    (whole_run / "records.jsonl").unlink()
    for record in [*records[:9], records[2].model_copy(update={"server_round": 9})]:
        append_record(whole_run / "records.jsonl", record)
    best, last = (12 + 30 * (1 - 0.75**number) for number in (8, 2))
    assert (
        f"It fell by {best - last:.1f} from its best: ROUGE-L {best:.1f} after round 8, {last:.1f} after round 9."
        in headline(read_run(whole_run))
    )
