"""Writes the model card of an adapter that comes out of a run: how it was made and what it scores."""

from collections.abc import Sequence
from pathlib import Path

from flexlora.adapters.base_names import hub_file, is_gguf, is_path
from flexlora.adapters.card import Card, loading_text, table
from flexlora.data.pretraining import EMBEDDED_BASE, resolve_base_model
from flexlora.experiment.base import base_name
from flexlora.experiment.config import Config
from flexlora.report.plain_rows import score_rows
from flexlora.report.scores import last_evaluated
from flexlora.rounds.records import (
    MANIFEST_FILE,
    RECORDS_FILE,
    REFERENCES_FILE,
    RecordsError,
    ReferencesRecord,
    RoundRecord,
    read_manifest,
    read_records,
    read_references,
)
from flexlora.text import number_text, signed_text

EMBEDDED_TEXT = f"""`{EMBEDDED_BASE}` is on no hub: it is the small model inside the package `flexlora`
(`pip install flexlora`), and `flexlora.resolve_base_model` finds it there."""


MERGED_CODE = """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this folder")
```"""


def run_card(
    config: Config,
    run_folder: Path,
    server_round: int,
    rank: int,
    *,
    is_cut: bool,
    with_references: bool,
    is_merged: bool = False,
) -> Card:
    """Return the card of an adapter, or of a whole model with it merged in.

    Args:
        config: Of the run.
        run_folder: Where its records lie.
        server_round: The adapter is that after this round.
        rank: Of the adapter.
        is_cut: Whether the server's adapter has a larger rank.
        with_references: Whether to list what the run is compared with.
        is_merged: Whether base and adapter are one model.
    """
    base = base_name(config)
    rounds, references = _recorded(run_folder, server_round, with_references)
    what = "A model with a LoRA adapter merged in" if is_merged else "A LoRA adapter"
    text = "\n\n".join(
        [
            f"{what}, trained with federated learning by `flexlora`: clients keep "
            "their data, train LoRA at the rank that their device affords, and a server puts their updates together.",
            table(_facts(config, run_folder, server_round, rank, base), ("", "")),
            _scores(config, rounds, references, rank, is_cut),
            "## Use",
            _use(config, base, is_merged),
            "## Licence and limits",
            "The licence in the fields above is that of the base model where its card names one. Weights can hold what "
            "clients' data say: make sure that you may publish them, and correct the licence first.",
        ]
    )
    kind = "Model" if is_merged else "LoRA adapter"
    tags = ("federated-learning", config.method.name)
    library = "transformers" if is_merged else "peft"
    location = resolve_base_model(config.model.name_or_path)
    return Card(f"{kind} for {base}, rank {rank}", text, base, location, tags, library)


def _recorded(run_folder: Path, server_round: int, with_references: bool) -> tuple[list[RoundRecord], ReferencesRecord]:
    """Return the rounds up to one and what they are compared with; nothing where the records are damaged."""
    try:
        rounds = [record for record in read_records(run_folder / RECORDS_FILE) if record.server_round <= server_round]
        references = read_references(run_folder / REFERENCES_FILE) if with_references else ReferencesRecord()
    except RecordsError:  # The adapter comes from a checkpoint, which is whole.
        return [], ReferencesRecord()
    return rounds, references


def _facts(config: Config, run_folder: Path, server_round: int, rank: int, base: str) -> list[tuple[str, str]]:
    manifest = read_manifest(run_folder / MANIFEST_FILE)
    revision = f", revision {config.model.revision}" if config.model.revision else ""
    facts = [
        ("Base model", f"{base}{revision}"),
        ("Method", config.method.name),
        ("Rank", str(rank)),
        ("Rounds", f"{server_round} of {config.rounds.num_rounds}"),
        ("Data", config.data.name),
    ]
    differential = config.privacy.differential
    if differential is None or differential.noise_seed is not None:
        # Otherwise the noise comes from it, and a card is for everybody.
        facts.append(("Seed", str(config.seed)))
    if manifest is not None:
        clients = f"{manifest.num_clients}, {manifest.cohort_size} in a round" if manifest.cohort_size else ""
        facts.insert(4, ("Clients", clients or str(manifest.num_clients)))
        facts.append(("flexlora", manifest.flexlora_version))
    return facts


def _scores(
    config: Config, rounds: Sequence[RoundRecord], references: ReferencesRecord, rank: int, is_cut: bool
) -> str:
    """Return the section with the run's own scores on its unseen tasks."""
    scored = last_evaluated(rounds)
    if scored is None:
        return "## Scores\n\nThe run has left none."
    rows = [
        (
            f"{row['model']}, {row['detail']}" if row["detail"] else row["model"],
            number_text(row["rouge_l"]),
            number_text(row["exact_match"]),
            "" if row["loss"] is None else f"{row['loss']:.3f}",
            signed_text(row["difference_to_base"]),
        )
        for row in score_rows(rounds, references, config.method.name)
    ]
    headers = ("Model", "ROUGE-L", "Exact match", "Loss", "ROUGE-L against base")
    notes = (
        f"On the run's unseen tasks after round {scored.server_round}: ROUGE-L and exact match in 0 to 100, loss in "
        "nats per token."
    )
    if is_cut:
        notes += f" They are those of the adapter at the server's rank; this one is cut to rank {rank}."
    return f"## Scores\n\n{table(rows, headers)}\n\n{notes}"


def _use(config: Config, base: str, is_merged: bool) -> str:
    """Return the section with the code that loads what was written."""
    if is_merged:
        return MERGED_CODE
    if base == EMBEDDED_BASE:
        code = loading_text(base).replace(f'"{base}"', f'flexlora.resolve_base_model("{base}")')
        return code.replace("```python\n", "```python\nimport flexlora\n") + f"\n\n{EMBEDDED_TEXT}"
    text, name = loading_text(base), config.model.name_or_path
    if is_gguf(name):
        file = (hub_file(name) or ("", Path(name).name))[1]
        folder = base if hub_file(name) else "the folder of the base model"
        text = text.replace(f'"{base}"', f'"{folder}", gguf_file="{file}", dtype="float32"')
    elif is_path(name) and "/" not in base:
        text += f"\n\nThe base model was in a local folder called `{base}`; put the path of yours there."
    return text
