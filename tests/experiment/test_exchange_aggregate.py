"""A run over folders ends where a simulation ends, survives kills, and uses nothing that does not belong to it."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from flexlora.adapters.folder import read_adapter
from flexlora.engines.exchange_client import open_broadcast, train_reply
from flexlora.engines.exchange_keys import make_keys
from flexlora.engines.exchange_manifest import ExchangeError, ReplyManifest, facts_of, manifest_text, read_manifest_file
from flexlora.engines.flower.client_settings import ClientSettings
from flexlora.experiment.config import Config
from flexlora.experiment.config_file import parse_config
from flexlora.experiment.exchange_aggregate import aggregate_replies
from flexlora.experiment.exchange_init import begin_exchange
from flexlora.experiment.export import adapter_of_run, export_run
from flexlora.experiment.run import run_experiment
from flexlora.experiment.run_folder import ExperimentError
from flexlora.report.page import write_report
from flexlora.rounds.records import read_records

PLANS = {"north": "small", "south": "middle", "west": "large"}
ROUNDS = 2


def config_of(folder: Path, **sections: dict[str, object]) -> Config:
    """Return a run of three clients with a file each, of which a simulation has all and a file-based run none."""
    tree: dict[str, dict[str, object] | int] = {
        "seed": 3,
        "model": {"num_threads": 1, "clients_per_group": 1},
        "data": {
            "name": "instructions",
            "path": str(folder),
            "partition": "natural",
            "client_from": "file",
            "label_column": "label",
            "unseen_labels": ["public"],
            "max_length": 96,
        },
        "clients": {
            "types": {
                "small": {"attention": 2, "ffn": 2},
                "middle": {"attention": 2, "ffn": 4},
                "large": {"attention": 8, "ffn": 8},
            },
            "assigned": PLANS,
            "distribution": {"small": 1},
        },
        "method": {"name": "flexlora", "fold_tail": True},
        # AdamW's first steps are signs of gradients, in which the last bits of a sum can be seen.
        "training": {"optimizer": "sgd", "learning_rate": 0.3, "max_steps": 2, "schedule": "linear", "proximal": 0.1},
        "rounds": {"num_rounds": ROUNDS, "cohort_fraction": 1.0},
        "evaluation": {
            "every": 9,
            "rank_group_clients": 0,
            "local_only_clients": 0,
            "fedit_reference": False,
            "max_new_tokens": 2,
        },
    }
    for name, own in sections.items():
        tree[name] = {**tree[name], **own}  # type: ignore[dict-item]
    return parse_config(tree, "the test")


@pytest.fixture(scope="module")
def silos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("silos")
    for name in (*PLANS, "public"):
        label = "public" if name == "public" else "own"
        rows = [
            {"instruction": f"{name} {number}", "response": f"{number % 7} {name}", "label": label}
            for number in range(16)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def train(broadcasts: Path, silos: Path, out: Path, clients: Sequence[str] = tuple(PLANS)) -> Path:
    """Train clients from what a round has sent; return the folder with their replies."""
    for name in clients:
        opened = open_broadcast(broadcasts / PLANS[name])
        own = ClientSettings(name, silos / f"{name}.jsonl", None, num_threads=1)
        train_reply(opened, own, out / name)
    return out


@pytest.fixture(scope="module")
def begun(silos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that waits for the replies of round 1; never to be changed."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    begin_exchange(config_of(silos), folder)
    return folder


@pytest.fixture(scope="module")
def replies(begun: Path, silos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the replies of round 1; never to be changed."""
    return train(begun / "broadcasts" / "round-0001", silos, tmp_path_factory.mktemp("replies"))


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "run"))


@pytest.fixture
def given(replies: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(replies, tmp_path / "replies"))


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files of a run but those with wall times in them."""
    timed = ("manifest.json", "records.jsonl", "report.html", "state.json")
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in timed
    }


def test_a_run_over_files_ends_with_the_adapters_of_a_simulation(
    begun: Path, silos: Path, replies: Path, run: Path, tmp_path: Path
) -> None:
    done = aggregate_replies(run, [replies])
    assert (done.used, done.refused, done.num_rounds) == (("north", "south", "west"), (), ROUNDS)
    assert done.broadcasts is not None and (done.broadcasts / "small" / "frozen").is_dir()
    done = aggregate_replies(run, [train(done.broadcasts, silos, tmp_path / "second")])
    assert done.broadcasts is None
    run_experiment(config_of(silos), tmp_path / "simulated")
    ours, theirs = adapter_of_run(run), adapter_of_run(tmp_path / "simulated")
    for path, own in theirs.items():
        assert float((ours[path].delta() - own.delta()).norm()) <= 1e-5 * float(own.delta().norm())
    for here, there in zip(
        read_records(run / "records.jsonl"), read_records(tmp_path / "simulated" / "records.jsonl"), strict=True
    ):
        assert [(c.client_id, c.plan, c.ranks, c.num_examples, c.outcome) for c in here.clients] == [
            (c.client_id, c.plan, c.ranks, c.num_examples, c.outcome) for c in there.clients
        ]
        assert here.learning_rate == there.learning_rate
        if here.clients:
            assert here.train_loss == pytest.approx(there.train_loss, rel=1e-4)
    # What any run leaves behind works on this one.
    assert sorted(path.name for path in (run / "adapters").iterdir()) == ["rank-2", "rank-4", "rank-8"]
    export_run(run, tmp_path / "exported", rank=4)
    assert {own.rank for own in read_adapter(tmp_path / "exported").values()} == {4}
    assert write_report(run).is_file()
    with pytest.raises(ExperimentError, match="exchange files with it"):
        run_experiment(config_of(silos), run, resume=True)


def test_a_repeated_call_changes_nothing_and_says_so(run: Path, replies: Path) -> None:
    first = aggregate_replies(run, [replies])
    before = contents(run)
    again = aggregate_replies(run, [replies / name for name in reversed(list(PLANS))])
    assert again.is_repeat and not first.is_repeat and again.used == first.used
    assert contents(run) == before
    with pytest.raises(ExchangeError, match=r"is of round 1 and came too late"):
        aggregate_replies(run, [replies / "north"])


def test_replies_of_the_next_round_among_those_used_are_not_passed_over(run: Path, given: Path) -> None:
    aggregate_replies(run, [given])
    shutil.copytree(given / "north", given / "north-2")
    reseal(given / "north-2", server_round=2)
    with pytest.raises(ExchangeError, match=r"round 2 needs replies") as caught:
        aggregate_replies(run, [given])
    assert "names another broadcast" in str(caught.value) and "came too late" in str(caught.value)


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize(
    "place",
    [
        "flexlora.experiment.exchange_aggregate.run_rounds",
        "flexlora.rounds.loop.save_checkpoint",
        "flexlora.rounds.loop.append_record",
        "flexlora.experiment.exchange_run.write_broadcast",
    ],
)
def test_a_call_that_is_killed_anywhere_is_finished_by_the_next(
    run: Path, replies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    aggregate_replies(whole, [replies])
    calls = []

    def killed(*arguments: object, **settings: object) -> object:
        calls.append(arguments)
        # The first rounds of a call are those that are over.
        if place.endswith("run_rounds") and len(calls) == 1:
            return original(*arguments, **settings)
        raise Killed

    module, _, name = place.rpartition(".")
    original = getattr(__import__(module, fromlist=[name]), name)
    with monkeypatch.context() as patch:
        patch.setattr(place, killed)
        with pytest.raises(Killed):
            aggregate_replies(run, [replies])
    done = aggregate_replies(run, [replies])
    assert done.server_round == 1 and done.used == ("north", "south", "west")
    assert contents(run) == contents(whole)
    assert [record.server_round for record in read_records(run / "records.jsonl")] == [0, 1]


def reseal(folder: Path, **changes: object) -> None:
    """Write a manifest that fits the files as they are, as somebody who means harm would."""
    told = read_manifest_file(folder, ReplyManifest)[0]
    told = told.model_copy(update={"files": facts_of(folder), **changes})
    (folder / "round.json").write_text(manifest_text(told))


def poison(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    weights[min(weights)] *= float("nan")
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    reseal(folder)


def flip(folder: Path) -> None:
    content = bytearray((folder / "adapter_model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "adapter_model.safetensors").write_bytes(content)


# What happens to a reply -> whether it is known whose it is, and why it is not used.
HARM = {
    "another run": (lambda folder: reseal(folder, run_id="0" * 32), False, "another run"),
    "a later round": (lambda folder: reseal(folder, server_round=2), False, "has not begun"),
    "another base": (lambda folder: reseal(folder, base_sha256="0" * 64), False, "another base model"),
    "another configuration": (lambda folder: reseal(folder, config_sha256="0" * 64), False, "another configuration"),
    "no rank plan of the run": (lambda folder: reseal(folder, plan="huge"), False, "must be one that was offered"),
    "a name that leads elsewhere": (lambda folder: reseal(folder, client="../../x"), False, "must be one word"),
    "no manifest that can be read": (
        lambda folder: (folder / "round.json").write_bytes(b"\xff"),
        False,
        "not valid JSON",
    ),
    "another rank plan": (lambda folder: reseal(folder, plan="large"), True, "names another broadcast"),
    "another start": (lambda folder: reseal(folder, started_from="0" * 64), True, "names another broadcast"),
    "a flipped bit": (flip, True, "was changed on its way"),
    "NaN": (poison, True, "NaN or infinity"),
    "a missing file": (lambda folder: (folder / "adapter_config.json").unlink(), True, "it is missing"),
}


def test_what_does_not_belong_or_cannot_be_used_is_left_out_with_its_reason(
    begun: Path, replies: Path, tmp_path: Path
) -> None:
    for number, (harm, (change, is_known, why)) in enumerate(HARM.items()):
        run = Path(shutil.copytree(begun, tmp_path / f"run-{number}"))
        given = Path(shutil.copytree(replies, tmp_path / f"replies-{number}"))
        change(given / "south")
        done = aggregate_replies(run, [given])
        assert done.used == ("north", "west"), harm
        assert [(one.folder.name, one.client) for one in done.refused] == [("south", "south" if is_known else None)]
        assert why in done.refused[0].reason, harm
        failed = {one.client_id: one.reason for one in done.record.clients if one.outcome == "failed"}
        assert set(failed) == ({"south"} if is_known else set()), harm
        listed = json.loads((run / "replies" / "round-0001.json").read_text())
        assert why in listed["refused"][0]["reason"] and sorted(listed["used"]) == ["north", "west"]


def test_two_replies_of_one_name_count_once_if_equal_and_not_at_all_if_not(run: Path, given: Path) -> None:
    shutil.copytree(given / "south", given / "south-again")
    shutil.copytree(given / "north", given / "north-again")
    reseal(given / "north-again", num_examples=10**6)
    done = aggregate_replies(run, [given])
    assert done.used == ("south", "west")
    assert {one.folder.name for one in done.refused} == {"north", "north-again", "south-again"}
    assert any("counts once" in one.reason for one in done.refused)
    assert sum("nobody can tell which counts" in one.reason for one in done.refused) == 2


def test_too_few_replies_change_nothing(run: Path, given: Path) -> None:
    poison(given / "south")
    before = contents(run)
    with pytest.raises(ExchangeError, match=r"needs replies of 3 clients that can be used; got 2") as caught:
        aggregate_replies(run, [given], min_clients=3)
    assert "south: " in str(caught.value)
    for folders, why in (([run], "hold none"), ([given / "nobody"], "not there"), ([run / "config.yaml"], "a file")):
        with pytest.raises(ExchangeError, match=why):
            aggregate_replies(run, folders)
    assert contents(run) == before
    assert aggregate_replies(run, [given]).used == ("north", "west")


def test_a_folder_that_is_no_such_run_or_was_changed_is_refused(run: Path, replies: Path, tmp_path: Path) -> None:
    with pytest.raises(ExchangeError, match=r"holds no exchange.json"):
        aggregate_replies(tmp_path, [replies])
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("learning_rate: 0.3", "learning_rate: 0.2"))
    with pytest.raises(ExchangeError, match="it has been changed"):
        aggregate_replies(run, [replies])
    (run / "config.yaml").write_text(text)
    (run / "exchange.json").write_bytes((run / "exchange.json").read_bytes().replace(b"0", b"1", 1))
    with pytest.raises(ValueError, match="digest"):
        aggregate_replies(run, [replies])


def test_replies_must_be_signed_where_keys_are_trusted(silos: Path, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    server = make_keys(tmp_path / "server")
    trusted = [make_keys(tmp_path / name) for name in ("north", "south")]
    begun = begin_exchange(config_of(silos), tmp_path / "run", key=tmp_path / "server", trusted=trusted)
    assert begun.clients == ("north", "south")
    keys = {"north": tmp_path / "north", "south": tmp_path / "north", "west": tmp_path / "south"}
    for name, key in keys.items():
        opened = open_broadcast(begun.broadcasts[PLANS[name]], server_key=server)
        own = ClientSettings(name, silos / f"{name}.jsonl", None, num_threads=1)
        train_reply(opened, own, tmp_path / "replies" / name, key)
    done = aggregate_replies(tmp_path / "run", [tmp_path / "replies"], key=tmp_path / "server")
    assert done.used == ("north",)
    reasons = {one.folder.name: one.reason for one in done.refused}
    assert "that of another key" in reasons["south"] and "west has none" in reasons["west"]
    assert done.broadcasts is not None
    open_broadcast(done.broadcasts / "small", server_key=server)
    with pytest.raises(ExchangeError, match=r"must be signed with the key of north.pub"):
        open_broadcast(done.broadcasts / "small", server_key=trusted[0])


def test_a_second_process_is_kept_out(run: Path, replies: Path) -> None:
    import fcntl

    with (run / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ExchangeError, match="one process at a time"):
            aggregate_replies(run, [replies])
