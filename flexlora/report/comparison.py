"""Chooses the runs to compare on the virtual clock, names them, and says what makes them incomparable."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath

from flexlora.foreign import ForeignError, read_yaml
from flexlora.report.reference_names import SHORT_NAMES, reference_runs
from flexlora.report.run_folder import RunFolder, check_target
from flexlora.report.virtual_time import TimedRun, common_target, timed_reference, timed_run

SCORING_SETTINGS = ("data.template", "data.max_length", "data.test_examples_per_task", "evaluation.max_new_tokens")
"""Settings that change a score whatever the adapter."""
HASHED = {"unseen": "the unseen tasks", "clients": "the clients' data", "devices": "the simulated devices"}
"""What each hash of a manifest stands for."""


def timed_runs(
    run: RunFolder, others: Sequence[RunFolder] = (), target: float | None = None
) -> tuple[list[TimedRun], float | None]:
    """Return the runs that had a virtual clock, references last, and the ROUGE-L whose time is of interest.

    Args:
        run: Comes first, with its references.
        others: Runs beside it; a folder that is named twice counts once.
        target: In 0 to 100; None takes the run's own, or else `common_target`.

    Raises:
        ReportError: If ``target`` is out of its range.
    """
    check_target(target)
    timed = [timed_run(name, folder.records, folder.manifest) for name, folder in _named(run, others).items()]
    # Only the references of this run: with those of all, the runs themselves would be hard to find.
    policy = run.manifest.policy if run.manifest else None
    # References average factors, which needs a server that waits for its cohort.
    policy = "wait" if policy == "async" else policy or "unknown"
    references = reference_runs(run.references)
    timed += [timed_reference(SHORT_NAMES[name], policy, reference) for name, reference in references.items()]
    present = [one for one in timed if one is not None]
    return present, common_target(present, _wanted(run, target))


def comparison_notes(run: RunFolder, others: Sequence[RunFolder] = (), target: float | None = None) -> list[str]:
    """Return sentences on the runs of `timed_runs`: which are missing, what differs, and which the target ignores."""
    timed, _ = timed_runs(run, others, target)
    folders, shown = _named(run, others), {one.name for one in timed}
    notes = []
    for name, folder in folders.items():
        if others and name not in shown:
            why = "has no virtual clock (devices.profiles gives it one)" if folder.records else "has not begun yet"
            notes.append(f"{name} is left out: it {why}.")
    notes.extend(disagreements({name: folder for name, folder in folders.items() if name in shown}))
    unlearned = [one.name for one in timed if not one.has_learned]
    if unlearned and _wanted(run, target) is None:
        if len(unlearned) < len(timed):
            notes.append(f"The target is chosen without {_listed(unlearned)}, which never scored above the base model.")
        else:
            notes.append(
                "No run has scored above its base model, so there is no target; flexlora report --target sets one."
            )
    return notes


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ending of each path that no other has: ``a/x`` and ``b/x``, but ``x`` where there is one.

    Args:
        paths: Absolute and all different.
    """
    names = []
    for path in paths:
        own, others = path.parts, [other.parts for other in paths if other != path]
        length = next(n for n in range(1, len(own) + 1) if all(other[-n:] != own[-n:] for other in others))
        names.append(PurePath(*own[-length:]).as_posix())
    return names


def _named(run: RunFolder, others: Sequence[RunFolder]) -> dict[str, RunFolder]:
    folders = {folder.path: folder for folder in (run, *others)}
    return dict(zip(distinct_names(list(folders)), folders.values(), strict=True))


def _wanted(run: RunFolder, target: float | None) -> float | None:
    return target if target is not None or run.manifest is None else run.manifest.target_rouge_l


def disagreements(folders: Mapping[str, RunFolder]) -> Iterator[str]:
    """Yield a warning for the runs that differ from the first in what every run of a comparison must share."""
    if len(folders) < 2:
        return
    (first, *_), (expected, *others) = folders, [_shared_facts(folder) for folder in folders.values()]
    differing: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, facts in zip(list(folders)[1:], others, strict=True):
        differing[tuple(what for what, value in facts.items() if expected.get(what, value) != value)].append(name)
    for what, names in differing.items():
        if what:
            yield f"Not comparable as they stand: {_listed([first, *names])} differ in {_listed(what)}."


def _shared_facts(folder: RunFolder) -> dict[str, object]:
    """Return what scores and virtual times depend on beyond method, ranks and policy, as far as it is recorded."""
    facts: dict[str, object] = {}
    if folder.manifest:
        facts["the base model"] = folder.manifest.base_model
        facts.update({HASHED.get(key, key): value for key, value in folder.manifest.data_hashes.items()})
    try:
        config = read_yaml(folder.config or "", folder.name)
    except ForeignError:
        config = None
    for setting in SCORING_SETTINGS:
        section, key = setting.split(".")
        settings = config.get(section) if isinstance(config, dict) else None
        if isinstance(settings, dict) and key in settings:
            facts[setting] = settings[key]
    return facts


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
