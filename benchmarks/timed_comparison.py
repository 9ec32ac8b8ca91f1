"""Which method is ahead after as many rounds as fit into a given time? One draw, several arms side by side.

    python benchmarks/timed_comparison.py configs/natural_instructions.yaml data.path=FOLDER --out runs/timed
    python benchmarks/timed_comparison.py configs/demo.yaml --rounds 2 --jobs 1 --minutes 5 --out runs/timed

Every arm is a process of its own, ``--jobs`` of them at a time; they share the device. Without ``--rounds`` the first
arms train two rounds on trial, and the slowest of them decides how many rounds all arms make. Clients, cohorts, order
of the data, schedule and number of rounds are the same for all; an arm that runs out of time says where it stopped.

    base              without adapter
    fedit-smallest    FedIT, every client at the smallest ranks
    flexlora          FlexLoRA as in the paper
    flexlora+ec+fold  with error compensation and folded tail
    fedit-largest     FedIT, every client at the largest ranks
    large-alone       FedIT among the clients with the largest ranks, without all others

``ARM@RATE`` starts the schedule at another learning rate. Every evaluation is one line of ``OUT/rows.jsonl`` as soon as
it is there, and so is the end of each arm: validation loss, and scores of generated text on unseen tasks.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

FLEXLORA: dict[str, Any] = {"name": "flexlora"}
ARMS: dict[str, tuple[Mapping[str, Any], str]] = {
    "fedit-smallest": ({"name": "fedit"}, "smallest"),
    "flexlora": (FLEXLORA, "own"),
    "flexlora+ec+fold": (FLEXLORA | {"error_compensation": True, "fold_tail": True}, "own"),
    "fedit-largest": ({"name": "fedit"}, "largest"),
    "large-alone": ({"name": "fedit"}, "only largest"),
}
TRIAL_ROUNDS = 2
EVALUATIONS = 5
# Of the time that is left after the trial, for the first arms; the rest is for later ones.
SHARE_OF_FIRST = 0.85
# For the last evaluation and what ends a process.
SECONDS_AT_THE_END = 20.0
POLL_SECONDS = 0.2


class OutOfTimeError(Exception):
    """The time of an arm is over."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What the process of an arm is told."""

    config: str
    overrides: Sequence[str]
    arm: str
    rounds: int | None
    until: float
    out: Path
    scratch: Path

    @property
    def name(self) -> str:
        return self.arm.partition("@")[0]

    @property
    def learning_rate(self) -> float | None:
        rate = self.arm.partition("@")[2]
        return float(rate) if rate else None


def append_row(out: Path, **row: Any) -> None:
    with (out / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"part": "comparison", **row}) + "\n")


def run_arm(job: Job) -> None:
    """Run one arm to its end or that of its time, and write its rows."""
    from flexlora.experiment.config_file import load_config
    from flexlora.experiment.loaded import LoadedRun
    from flexlora.experiment.participants import gather_participants
    from flexlora.experiment.scoring import Scorer, validation_loss

    started = time.time()
    config = load_config(job.config, job.overrides)
    participants = gather_participants(config)
    loaded = LoadedRun.load(config, participants)
    print(f"{job.arm}: {participants.in_words()}, loaded in {time.time() - started:.0f} s", flush=True)
    server_round, rounds, adapter, seconds = 0, 0, None, 0.0
    if job.name != "base":
        watch = Watch(job, loaded)
        train(job, loaded, watch)
        server_round, rounds, adapter, seconds = watch.server_round, watch.rounds, watch.adapter, watch.seconds
    scores = Scorer(loaded).scores(adapter)
    append_row(
        job.out,
        arm=job.arm,
        kind="end",
        server_round=server_round,
        rounds=rounds,
        validation_loss=validation_loss(loaded, adapter),
        unseen=scores.unseen.model_dump(),
        clients=participants.in_words(),
        train_seconds=seconds,
        arm_seconds=time.time() - started,
        peak_bytes=peak_bytes(),
    )


def peak_bytes() -> int:
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


class Watch:
    """Sees a loop evaluate and end rounds: writes rows, keeps the newest adapter, and stops when time is up."""

    def __init__(self, job: Job, loaded: Any) -> None:
        self.job, self.loaded = job, loaded
        self.server_round, self.current, self.adapter, self.seconds = 0, 0, None, 0.0
        self.rounds = job.rounds
        self.trial: list[float] | None = []

    def notify(self, event: Any) -> None:
        if event.kind == "cohort":
            self.current = event.server_round
        if event.kind != "done" or not event.server_round:
            return
        spent = event.record.seconds
        parts = ", ".join(f"{name} {value:.1f}" for name, value in spent.items())
        print(f"{self.job.arm}: round {event.server_round}, loss {event.record.train_loss}, {parts}", flush=True)
        failed = [client.reason for client in event.record.clients if client.outcome == "failed"]
        if failed:
            print(f"{self.job.arm}: {len(failed)} clients failed, the first because: {failed[0]}", flush=True)
        if self.trial is not None:
            self.trial.append(spent["total"])
            return
        self.seconds += spent["total"]
        is_last = event.server_round == self.rounds
        if not is_last and time.time() + spent["total"] > self.job.until:
            raise OutOfTimeError

    def scores(self, adapter: Any) -> Any:
        from flexlora.experiment.scoring import validation_loss
        from flexlora.rounds.records import EvaluationRecord, ScoreRecord

        nothing = ScoreRecord(rouge_l=0.0, exact_match=0.0, loss=0.0, num_examples=0, num_tasks=0)
        if adapter is not None and self.trial is None:
            self.server_round, self.adapter = self.current, adapter
            loss = validation_loss(self.loaded, adapter)
            append_row(
                self.job.out, arm=self.job.arm, kind="round", server_round=self.server_round, validation_loss=loss
            )
        return EvaluationRecord(unseen=nothing, unseen_unweighted=nothing, categories={}, validation_loss=None)

    def rank_groups(self, broadcast: Callable[[Any], Any]) -> dict[str, Any]:
        return {}


def train(job: Job, loaded: Any, watch: Watch) -> None:
    """Train for the rounds asked for, or for as many as the trial says."""
    from flexlora.experiment.method_config import read_method
    from flexlora.experiment.round_loop import round_loop
    from flexlora.rounds.loop import run_rounds

    method, which = ARMS[job.name]
    folder = job.scratch / job.arm

    def run(num_rounds: int) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        rounds = loaded.config.rounds.model_copy(update={"num_rounds": num_rounds})
        config = loaded.config.model_copy(update={"rounds": rounds})
        own = dataclasses.replace(loaded, config=config)
        loop = round_loop(own, read_method(method), clients_of(own, which), folder, watch.notify, job.learning_rate)
        every = max(1, num_rounds // EVALUATIONS)
        settings = dataclasses.replace(
            loop.settings, patience=None, evaluate_every=every, checkpoint_every=num_rounds, keep_checkpoints=1
        )
        run_rounds(dataclasses.replace(loop, evaluator=watch, settings=settings))

    num_rounds = job.rounds
    if num_rounds is None:
        run(TRIAL_ROUNDS)
        assert watch.trial
        num_rounds = agreed_rounds(job, watch.trial[-1])
    watch.trial, watch.rounds = None, num_rounds
    try:
        run(num_rounds)
    except OutOfTimeError:
        print(f"{job.arm}: out of time in round {watch.current}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)


def clients_of(loaded: Any, which: str) -> Sequence[Any]:
    from flexlora.experiment.control_clients import at_smallest_ranks

    clients = loaded.participants.clients
    if which == "own":
        return clients
    if which == "smallest":
        return at_smallest_ranks(loaded)
    plans = loaded.participants.plans.values()
    largest = max(plans, key=lambda plan: sum(plan.resolve(loaded.shapes).values()))
    if which == "only largest":
        return [client for client in clients if client.plan == largest]
    return [dataclasses.replace(client, plan=largest) for client in clients]


def agreed_rounds(job: Job, seconds: float) -> int:
    """Tell the parent how long a round takes here and wait for the number of rounds."""
    (job.scratch / f"trial-{job.arm}.json").write_text(json.dumps(seconds))
    answer = job.scratch / "rounds.json"
    while not answer.exists() and time.time() < job.until:
        time.sleep(POLL_SECONDS)
    return json.loads(answer.read_text())


class Arms:
    """The processes of all arms."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.until = options, time.time() + 60 * options.minutes
        self.rounds: int | None = options.rounds
        self.slowest, self.failed = 0.0, False
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def run(self) -> None:
        waiting = self.options.arms.split(",")
        first = [arm for arm in waiting if arm != "base"][: self.options.jobs]
        while waiting or self.running:
            busy = sum(arm != "base" for arm in self.running)
            # Without a number of rounds only the first arms may start: they find it.
            if waiting and (
                waiting[0] == "base" or (busy < self.options.jobs and (self.rounds or waiting[0] in first))
            ):
                arm = waiting.pop(0)
                if self.has_time_for(arm):
                    self.start(arm)
                continue
            time.sleep(POLL_SECONDS)
            for arm in [arm for arm, process in self.running.items() if process.poll() is not None]:
                code = self.running.pop(arm).returncode
                self.failed |= code != 0
                print(f"{arm}: ended with {code}", flush=True)
            if self.rounds is None:
                self.decide(first)
            if time.time() > self.until:
                for arm, process in self.running.items():
                    print(f"{arm}: stopped, its time is over", flush=True)
                    process.kill()
                    append_row(self.options.out, arm=arm, kind="stopped", reason="no time left")
                    self.failed = True
                return

    def has_time_for(self, arm: str) -> bool:
        needed = SECONDS_AT_THE_END + (self.rounds or 0) * self.slowest / 3
        if time.time() + needed < self.until:
            return True
        append_row(self.options.out, arm=arm, kind="left out", reason="no time left")
        return False

    def start(self, arm: str) -> None:
        options = self.options
        command = [sys.executable, __file__, options.config, *options.overrides, "--arm", arm, "--out", options.out]
        command += ["--scratch", options.scratch]
        command += ["--until", str(self.until - SECONDS_AT_THE_END)]
        command += ["--rounds", str(self.rounds)] if self.rounds else []
        self.running[arm] = subprocess.Popen(list(map(str, command)))

    def decide(self, first: Sequence[str]) -> None:
        """Fix the number of rounds once each of the first arms has said how long one takes, or has failed."""
        files = [self.options.scratch / f"trial-{arm}.json" for arm in first]
        found = [json.loads(file.read_text()) for file in files if file.exists() and file.stat().st_size]
        if len(found) < len(first) and any(
            arm in self.running and not file.exists() for arm, file in zip(first, files, strict=True)
        ):
            return
        if not found:
            self.rounds = 1
            return
        self.slowest = max(found)
        left = (self.until - SECONDS_AT_THE_END - time.time()) * SHARE_OF_FIRST
        self.rounds = max(2, min(self.options.most_rounds, int(left / self.slowest)))
        part = self.options.scratch / "rounds.json.part"
        part.write_text(json.dumps(self.rounds))
        part.rename(self.options.scratch / "rounds.json")
        append_row(
            self.options.out, kind="rounds", rounds=self.rounds, trial_seconds=dict(zip(first, found, strict=False))
        )
        print(f"{self.rounds} rounds of at most {self.slowest:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", help="key=value, as for flexlora run")
    parser.add_argument("--arms", default=",".join(["base", *ARMS]))
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything")
    parser.add_argument("--rounds", type=int, help="without a trial")
    parser.add_argument("--most-rounds", type=int, default=30, help="of what the trial may decide for")
    parser.add_argument("--jobs", type=int, default=4, help="arms that train at the same time")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, help="folder that is emptied first; OUT/scratch by default")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args()
    options.scratch = options.scratch or options.out / "scratch"
    if options.arm is None:
        options.out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(options.scratch, ignore_errors=True)
        options.scratch.mkdir(parents=True)
        unknown = {arm.partition("@")[0] for arm in options.arms.split(",")} - {"base", *ARMS}
        if unknown:
            raise SystemExit(f"--arms must be among base, {', '.join(ARMS)}; got {', '.join(sorted(unknown))}")
        arms = Arms(options)
        arms.run()
        raise SystemExit(1 if arms.failed else 0)
    job = Job(
        options.config, options.overrides, options.arm, options.rounds, options.until, options.out, options.scratch
    )
    try:
        run_arm(job)
    except Exception as error:
        traceback.print_exc()
        append_row(job.out, arm=job.arm, kind="failed", reason=f"{type(error).__name__}: {error}"[:500])
        sys.stdout.flush()
        os._exit(1)


if __name__ == "__main__":
    main()
