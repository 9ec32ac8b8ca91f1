"""Headlines and status, word for word."""

from pathlib import Path

from flexlora.report.headline import headline, notices, status, tiles
from flexlora.report.run_folder import read_run
from flexlora.rounds.records import RoundRecord, append_record


def test_the_headline_says_what_was_run_and_what_came_of_it(whole_run: Path) -> None:
    assert headline(read_run(whole_run)) == (
        "12 rounds of flexlora on the flexlora/tiny-llama model with 80 clients in 4 rank plans. ROUGE-L on unseen "
        "tasks rose from 12.0 (base model alone) to 41.0: +29.0 points. FedIT at the smallest rank reached 32.9 "
        "(8.1 points less); training alone reached 17.5 (23.5 points less)."
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
    assert "FedIT at the smallest rank reached 32.9 (23.4 points more)" in text


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
    assert "ROUGE-L on unseen tasks stayed at 12.0, that of the base model alone. FedIT" in text


def test_tiles_compare_with_each_reference_and_sum_the_traffic(whole_run: Path, records: list[RoundRecord]) -> None:
    found = {tile.label: (tile.value, tile.detail) for tile in tiles(read_run(whole_run))}
    assert found["Unseen ROUGE-L"] == ("41.0", "+29.0 points over base")
    assert found["Versus FedIT, smallest rank"] == ("+8.1", "points; it reached 32.9")
    assert found["Versus training alone"] == ("+23.5", "points; it reached 17.5")
    moved = sum(client.up_bytes + client.down_bytes for record in records for client in record.clients)
    assert found["Traffic"][0] == f"{moved / 1e6:.1f} MB"


def test_other_reference_runs_come_behind_and_keep_the_capital_of_fedit(run_with_controls: Path) -> None:
    run = read_run(run_with_controls)
    assert headline(run).endswith(
        "(23.5 points less); large clients alone reached 30.0 (11.0 points less); "
        "FedIT at the largest rank reached 45.5 (4.5 points more)."
    )
    found = {tile.label: tile.value for tile in tiles(run)}
    assert found["Versus large clients alone"] == "+11.0"
    assert found["Versus FedIT, largest rank"] == "−4.5"


def test_notices_are_the_warnings_and_the_notes_of_rounds(whole_run: Path) -> None:
    assert notices(read_run(whole_run)) == [
        "2 clients have fewer than 16 examples",
        "Round 5: two clients shared one name",
    ]
