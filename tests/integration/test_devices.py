"""Whole runs on simulated devices: every policy on the embedded base, and what is left behind."""

import itertools
import json
from pathlib import Path

import pytest

from flexlora.experiment.config import Config
from flexlora.experiment.config_file import parse_config
from flexlora.experiment.estimate import plan_experiment
from flexlora.experiment.participants import gather_participants
from flexlora.experiment.run import run_experiment
from flexlora.experiment.run_folder import ExperimentError
from flexlora.experiment.workload import cost_on_device
from flexlora.report.comparison import timed_runs
from flexlora.report.run_folder import read_run
from flexlora.rounds.records import RoundRecord, read_manifest, read_records
from flexlora.text import bytes_text

pytestmark = pytest.mark.integration

DEVICES = """name,memory_megabytes,gigaflops_per_second,down_megabits_per_second,up_megabits_per_second,dropout,weight
watch,20,0.5,1,0.5,0,1
phone,38.6,2,5,1,0.1,4
laptop,200,50,50,10,0,4
"""
POLICIES = {
    "wait": {},
    "deadline": {"deadline_seconds": 2.0},
    "over_select": {"over_selection": 1.5},
    "async": {"buffer_size": 2, "jitter": 0.2},
}


def config_of(folder: Path, policy: str = "wait", **sections: dict[str, object]) -> Config:
    (folder / "devices.csv").write_text(DEVICES)
    tree: dict[str, dict[str, object]] = {
        "model": {"num_threads": 1},
        "data": {
            "name": "generated",
            "num_clients": 24,
            "examples_per_task": 12,
            "num_unseen_tasks": 2,
            "test_examples_per_task": 1,
            "validation_examples": 4,
            "max_length": 160,
        },
        "devices": {"profiles": str(folder / "devices.csv"), "max_rank": 8},
        "clients": {"ranks_from": "devices"},
        "clock": {"policy": policy, **POLICIES[policy]},
        "training": {"max_steps": 1},
        "rounds": {"num_rounds": 3, "cohort_size": 4},
        "evaluation": {
            "every": 3,
            "max_new_tokens": 2,
            "local_only_clients": 0,
            "rank_group_clients": 0,
            "fedit_reference": False,
        },
    }
    for name, values in sections.items():
        tree[name] = {**tree[name], **values}
    return parse_config(tree, "test")


def untimed(records: list[RoundRecord]) -> list[dict[str, object]]:
    return [json.loads(record.model_dump_json(exclude={"seconds"})) for record in records]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_runs_from_configuration_to_report(tmp_path: Path, policy: str) -> None:
    config = config_of(tmp_path, policy)
    result = run_experiment(config, tmp_path / "run")
    assert result.has_progress
    records, manifest = read_records(tmp_path / "run" / "records.jsonl"), read_manifest(tmp_path / "run/manifest.json")
    assert manifest is not None and manifest.policy == policy
    assert any("with the device watch: at rank 1 it needs" in warning for warning in manifest.warnings)
    assert set(manifest.device_counts) == {"phone", "laptop"} == set(manifest.plan_ranks)
    assert sum(manifest.device_counts.values()) == manifest.num_clients < 24
    clock = [record.virtual_clock_seconds for record in records]
    assert clock[0] == 0 and all(a is not None and b is not None and a < b for a, b in itertools.pairwise(clock))
    for record in records[1:]:
        for client in record.clients:
            assert client.plan == client.device
            assert client.virtual_seconds is not None and client.virtual_seconds > 0
    runs, target = timed_runs(read_run(tmp_path / "run"))
    # Answers of two tokens are never right: there is no score to reach.
    assert [own.policy for own in runs] == [policy] and target is None
    assert "On the virtual clock" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    again = run_experiment(config, tmp_path / "again")
    assert untimed(list(again.rounds)) == untimed(records)


def test_a_longer_asynchronous_run_goes_on_where_the_shorter_one_ended(tmp_path: Path) -> None:
    whole = run_experiment(config_of(tmp_path, "async", evaluation={"every": 1}), tmp_path / "whole")
    short = config_of(tmp_path, "async", evaluation={"every": 1}, rounds={"num_rounds": 1})
    run_experiment(short, tmp_path / "cut")
    cut = run_experiment(config_of(tmp_path, "async", evaluation={"every": 1}), tmp_path / "cut", resume=True)
    for left, right in zip(untimed(list(cut.rounds))[2:], untimed(list(whole.rounds))[2:], strict=True):
        assert left == right
    # Devices are as much a part of a run as its data.
    changed = config_of(tmp_path, "async", evaluation={"every": 1}, rounds={"num_rounds": 4})
    (tmp_path / "devices.csv").write_text(DEVICES.replace("laptop,200,50", "laptop,200,51"))
    with pytest.raises(ExperimentError, match=r"these have changed: devices"):
        run_experiment(changed, tmp_path / "cut", resume=True)


def test_the_plan_shows_what_each_device_affords_and_what_limits_it(tmp_path: Path) -> None:
    rows = {row.device: row for row in plan_experiment(config_of(tmp_path)).devices}
    assert rows["phone"].limited_by == "memory" and rows["phone"].cost.memory_bytes <= 38.6e6
    assert rows["laptop"].limited_by == "largest rank allowed"
    assert max(rows["phone"].ranks.values()) < max(rows["laptop"].ranks.values()) == 8
    assert rows["watch"].limited_by == "left out: memory" and rows["watch"].num_clients == 0
    assert rows["phone"].fixed_types == {"type1": "", "type2": "memory", "type3": "memory", "type4": "memory"}
    json.dumps(plan_experiment(config_of(tmp_path)).to_json(), allow_nan=False)


def test_fixed_types_that_do_not_fit_their_device_run_out_of_memory(tmp_path: Path) -> None:
    types = {"watch": "type1", "phone": "type4", "laptop": "type4"}
    config = config_of(tmp_path, clients={"ranks_from": "types"}, devices={"types": types, "max_rank": 64})
    result = run_experiment(config, tmp_path / "run")
    outcomes = {(c.device, c.plan, c.outcome) for record in result.rounds for c in record.clients}
    assert outcomes <= {("watch", "type1", "failed"), ("phone", "type4", "failed"), ("laptop", "type4", "ok")}
    assert ("laptop", "type4", "ok") in outcomes and len(outcomes) >= 2
    rows = {row.device: row for row in plan_experiment(config).devices}
    assert (rows["phone"].limited_by, rows["laptop"].limited_by) == ("memory", "")


def owned_rows(path: Path) -> Path:
    """Four owners of very different numbers of rows, and as many of another device."""
    words = ["red", "green", "blue", "grey", "pink", "black", "white", "brown"]
    rows = [
        {
            "instruction": f"Say the word {words[row % 8]} for the {row}th time.",
            "response": words[row % 8],
            "owner": owner,
        }
        for owner, number in {"tiny": 12, "small": 24, "large": 120, "huge": 480}.items()
        for row in range(1000 * number, 1001 * number)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_every_client_gets_ranks_that_fit_its_own_number_of_examples(tmp_path: Path) -> None:
    config = config_of(tmp_path, clock={"policy": "deadline", "deadline_seconds": 7.0}, training={"max_steps": None})
    (tmp_path / "devices.csv").write_text(DEVICES.splitlines()[0] + "\nphone,200,4,5,1,0,1\n")
    data = {
        "name": "instructions",
        "path": str(owned_rows(tmp_path / "rows.jsonl")),
        "partition": "natural",
        "client_column": "owner",
        "validation_examples": 4,
        "test_examples_per_task": 1,
    }
    config = parse_config({**config.model_dump(mode="json", exclude_unset=True), "data": data}, "test")
    participants = gather_participants(config)
    workload, phone = participants.workload, participants.devices["phone"]
    assert workload is not None
    ranks = {}
    for client in participants.clients:
        resolved = client.plan.resolve(workload.shapes)
        ranks[client.client_id] = max(resolved.values())
        assert cost_on_device(workload, phone, resolved, client.num_examples, {}).seconds <= 7
        assert client.plan.name.startswith("phone at rank")
    assert (
        ranks["tiny"] == 8 and ranks["tiny"] >= ranks["small"] >= ranks["large"] >= 1 and len(set(ranks.values())) > 1
    )
    (warning,) = [text for text in participants.warnings if "Left out" in text and "device" in text]
    assert "1 of 4 clients with the device phone, with" in warning and "(clock.deadline_seconds)" in warning
    assert "huge" not in ranks
    rows = plan_experiment(config).devices
    assert [row.num_clients for row in rows if row.plan] and rows[-1].limited_by == "left out: time"


def test_clients_that_can_send_no_update_are_counted(tmp_path: Path) -> None:
    types = {"watch": "type1", "phone": "type4", "laptop": "type1"}
    fixed = {"clients": {"ranks_from": "types"}, "devices": {"types": types, "max_rank": 64}}
    participants = gather_participants(config_of(tmp_path, **fixed))
    lacking = sum(client.device != "laptop" for client in participants.clients)
    (warning,) = [text for text in participants.warnings if "no update" in text]
    assert warning.startswith(f"{lacking} of 24 clients, with ") and f"{lacking} lack memory" in warning
    late = gather_participants(config_of(tmp_path, "deadline", **fixed, clock={"deadline_seconds": 0.001}))
    (warning,) = [text for text in late.warnings if "no update" in text]
    assert warning.startswith("24 of 24 clients, with 100.0 % of the examples") and "24 need more than" in warning


@pytest.mark.parametrize("policy", ["over_select", "async"])
def test_the_plan_counts_the_clients_that_the_policy_samples(tmp_path: Path, policy: str) -> None:
    # More rounds, so that those who are still at work at the end count for little.
    options = {"clock": {"jitter": 0.0, "over_selection": 2.0, "buffer_size": 2}} if policy == "async" else {}
    config = config_of(tmp_path, policy, rounds={"num_rounds": 8}, devices={"max_rank": 1}, **options)
    plan = plan_experiment(config)
    result = run_experiment(config, tmp_path / "run")
    clients = [client for record in result.rounds for client in record.clients]
    sent = {"over_select": 6, "async": 2}[policy]
    assert f"{min(sent, 4)} in each of 8 rounds" in dict(plan.facts)["Clients"]
    measured = sum(client.down_bytes + client.up_bytes for client in clients)
    num_clients = sum(row.num_clients for row in plan.types)
    down, up = (
        sum(row.num_clients * size for row, size in zip(plan.types, sizes, strict=True)) / num_clients
        for sizes in ([row.down_bytes for row in plan.types], [row.cost.transfer_bytes for row in plan.types])
    )
    planned = 8 * (sent * down + min(sent, 4) * up)
    assert dict(plan.facts)["Traffic of the run"] == bytes_text(planned)
    assert measured == pytest.approx(planned, rel=0.25)
