"""The questions of the first screen: answered with intervals, or said to be open."""

from pathlib import Path

import pytest

from flexlora.report.first_screen import Card, cards, comparisons
from flexlora.report.run_folder import read_run
from flexlora.rounds.records import RoundRecord, append_record, read_manifest, write_manifest


def card_of(folder: Path, question: str) -> Card:
    return next(card for card in cards(read_run(folder)) if card.question == question)


def rewritten(folder: Path, records: list[RoundRecord]) -> Path:
    (folder / "records.jsonl").unlink()
    for record in records:
        append_record(folder / "records.jsonl", record)
    return folder


def test_every_model_that_the_run_is_compared_with_has_an_interval(run_with_controls: Path) -> None:
    found = comparisons(read_run(run_with_controls))
    # Eight clients trained alone, too few for a difference.
    assert [one.name for one in found] == [
        "FedIT at the smallest rank",
        "Large clients alone",
        "FedIT at the largest rank",
        "The base model",
    ]
    final = 12 + 30 * (1 - 0.75**12)
    assert [one.value for one in found] == [pytest.approx(final - other) for other in (32.9, 30.0, 45.5, 12.0)]
    assert all(one.interval is not None for one in found)


def test_a_difference_beyond_chance_is_real_and_a_loss_is_called_one(
    whole_run: Path, records: list[RoundRecord]
) -> None:
    card = card_of(whole_run, "Is the difference real?")
    assert card.answer.startswith("Yes: +") and card.style == "up"
    assert "paired bootstrap over 8 tasks" in card.details[-1]
    lost = card_of(rewritten(whole_run, records[:3]), "Is the difference real?")
    # Round 2 has 25.1 where FedIT has 32.9, lower on every task.
    assert lost.answer.startswith("Yes, a loss: −") and lost.style == "down"
    assert card_of(whole_run, "Who loses?").answer == "8 of 8 tasks"


def test_without_scores_of_tasks_nothing_is_called_real(whole_run: Path, records: list[RoundRecord]) -> None:
    bare = [
        record.model_copy(
            update={"evaluation": record.evaluation and record.evaluation.model_copy(update={"tasks": {}})}
        )
        for record in records
    ]
    card = card_of(rewritten(whole_run, bare), "Is the difference real?")
    assert card.answer == "Cannot be told"
    assert any("no interval" in line for line in card.details)


def test_kinds_of_device_lose_by_name_or_not_at_all(whole_run: Path, records: list[RoundRecord]) -> None:
    assert "No kind of device is shown to lose" in card_of(whole_run, "Who loses?").details[-1]
    last = records[12].evaluation
    assert last
    groups = dict(last.rank_groups)
    worse = [one.model_copy(update={"rouge_l": one.base_rouge_l - 3}) for one in groups["type2"].clients]
    groups["type2"] = groups["type2"].model_copy(update={"clients": worse})
    ended = last.model_copy(update={"rank_groups": groups})
    folder = rewritten(whole_run, [*records[:12], records[12].model_copy(update={"evaluation": ended})])
    assert "laptop −3.0 (−3.0 to −3.0)" in card_of(folder, "Who loses?").details[-1]
    few = {name: one.model_copy(update={"num_clients": 1, "clients": one.clients[:1]}) for name, one in groups.items()}
    ended = last.model_copy(update={"rank_groups": few})
    rewritten(whole_run, [*records[:12], records[12].model_copy(update={"evaluation": ended})])
    words = card_of(whole_run, "Who loses?").details[-1]
    assert "no claim. It takes 30 clients" in words and "at most 1 of each" in words


def test_the_time_names_the_machine(whole_run: Path) -> None:
    manifest = read_manifest(whole_run / "manifest.json")
    assert manifest
    changed = manifest.model_copy(update={"machine": "Toaster 3000, 2 cores, 4 GB", "num_threads": 1})
    write_manifest(whole_run / "manifest.json", changed)
    card = card_of(whole_run, "How long, on which machine?")
    # 12 rounds of 15 s and 6.5 s for the base.
    assert card.answer == "3 min 06 s"
    assert card.details[0] == "on Toaster 3000, 2 cores, 4 GB, 1 thread."


def test_a_run_that_has_only_the_base_asks_little(base_only_run: Path) -> None:
    assert [card.question for card in cards(read_run(base_only_run))] == ["How long, on which machine?"]
