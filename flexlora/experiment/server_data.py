"""Gathers what the server of a real federation can score on: unseen tasks of its own, and no data of its clients."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flexlora.data.data_notes import DataNotes
from flexlora.data.examples import Example, ExampleSplits, FederatedCorpus
from flexlora.data.instruction_schemas import RowReader
from flexlora.data.instructions import read_instructions
from flexlora.experiment.client_plans import config_plans
from flexlora.experiment.config import Config, ConfigError
from flexlora.experiment.config_data import GeneratedData, InstructionsData, NaturalInstructionsData
from flexlora.experiment.corpora import corpus_of
from flexlora.experiment.participants import Participants
from flexlora.federation.clients import ClientSpec

NOTHING_TO_SCORE = "The server has nothing to score adapters on; deployment.scored_on names a file."


def without_clients(config: Config) -> Participants:
    """Return what is known before any client has joined: unseen tasks, and the plans that clients may have."""
    unseen = _unseen(config)
    corpus = FederatedCorpus(clients={}, unseen=unseen)
    return Participants(
        corpus=corpus,
        validation=(),
        clients=(),
        plans=dict(sorted(config_plans(config).items())),
        warnings=() if unseen else (NOTHING_TO_SCORE,),
    )


def with_clients(participants: Participants, clients: Sequence[ClientSpec]) -> Participants:
    """Return the participants of a run whose clients keep their data to themselves."""
    nothing = ExampleSplits((), (), ())
    corpus = replace(participants.corpus, clients={client.client_id: nothing for client in clients})
    plans = {client.plan.name: client.plan for client in clients}
    return replace(participants, corpus=corpus, clients=tuple(clients), plans=dict(sorted(plans.items())))


def _unseen(config: Config) -> dict[str, ExampleSplits]:
    """Return task -> examples that the server itself holds or makes."""
    data, scored_on = config.data, config.deployment.scored_on
    if scored_on is not None:
        return _labelled(config, Path(scored_on).expanduser())
    if isinstance(data, NaturalInstructionsData) and not Path(data.path).expanduser().exists():
        return {}
    if isinstance(data, GeneratedData | NaturalInstructionsData):
        corpus, _ = corpus_of(config)
        return dict(corpus.unseen)
    return {}


def _labelled(config: Config, path: Path) -> dict[str, ExampleSplits]:
    """Return the rows of a file, each label a task."""
    if not path.exists():
        problem = f"deployment.scored_on must be a file or folder of rows; there is none at {path}"
        raise ConfigError([problem], "the configuration of a run with real clients")
    data = config.data
    is_instructions = isinstance(data, InstructionsData)
    label_column = data.label_column if is_instructions else None
    taken = () if label_column is None else (label_column,)
    reader = RowReader(DataNotes(), data.columns if is_instructions else {}, data.loss_on == "all", taken)
    tasks: dict[str, list[Example]] = {}
    for row in read_instructions(path, reader, label_column):
        tasks.setdefault(row.label or path.stem, []).extend(row.examples)
    return {name: ExampleSplits((), (), examples) for name, examples in sorted(tasks.items()) if examples}
