"""Takes the global adapter out of a run, at any rank: for PEFT, merged into the base, or in memory."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flexlora.adapters.hub import push_folder
from flexlora.adapters.merge_into_base import merge_into_base
from flexlora.adapters.rank_layout import RankLayout, Ranks
from flexlora.adapters.write import write_adapter
from flexlora.aggregators.base import Aggregator, state_types
from flexlora.experiment.base import base_name, load_base
from flexlora.experiment.best_round import WhichRound, best_checkpoint
from flexlora.experiment.config import Config
from flexlora.experiment.export_request import check_export
from flexlora.experiment.gathered import GatheredRun
from flexlora.experiment.kept_rounds import check_checkpoints, check_rank, tell_of_later_rounds
from flexlora.experiment.loaded import scaling_rule
from flexlora.experiment.round_loop import aggregator_of
from flexlora.experiment.run_card import run_card
from flexlora.experiment.run_folder import ADAPTERS_FOLDER, ExperimentError, read_run_config
from flexlora.federation.messages import Broadcast
from flexlora.lora.factors import AdapterState, Scaling
from flexlora.lora.product import ProductSum, Spectrum, Split, add_product, decompose
from flexlora.rounds.checkpoint import load_latest
from flexlora.rounds.loop_parts import Loop, Outcome
from flexlora.rounds.records import CHECKPOINTS_FOLDER


def write_run_adapters(run: GatheredRun, loop: Loop, outcome: Outcome, folder: Path) -> None:
    """Write the global adapter at the server's rank and at the rank of each kind of client."""
    federation = loop.federation
    for leftover in (folder / ADAPTERS_FOLDER).glob(".*"):
        shutil.rmtree(leftover)  # A write that was killed before it could appear.
    wanted = {max(federation.server_ranks.values())}
    wanted |= {max(plan.resolve(run.shapes).values()) for plan in run.participants.plans.values()}
    top = max(federation.server_ranks.values())
    whole = loop.aggregator.broadcast(outcome.state, federation.server_ranks)
    for rank in sorted(rank for rank in wanted if rank <= top):
        adapter = adapter_at_rank(whole, rank, loop.federation.scaling)
        # Without the references, which are measured later: a resumed run must write the same.
        card = run_card(run.config, folder, outcome.server_round, rank, is_cut=rank < top, with_references=False)
        target, revision = folder / ADAPTERS_FOLDER / f"rank-{rank}", run.config.model.revision
        write_adapter(target, adapter, base_name(run.config), revision=revision, card=card)


def export_run(
    run_folder: Path | str,
    folder: Path | str,
    *,
    rank: int | None = None,
    merged: bool = False,
    ranks: Ranks = "uniform",
    pad_to: int | None = None,
    which: WhichRound = "last",
    push_to_hub: str | None = None,
) -> dict[str, Any]:
    """Write the global adapter of a run as a standard PEFT folder, or merged into the whole model.

    Args:
        run_folder: The folder of a run that has got past round 0.
        folder: Where to write; must not exist.
        rank: In 1 to the server's rank; None takes all of it. Modules whose server rank is smaller keep theirs.
        merged: Write base and adapter as one model, with the tokenizer.
        ranks: ``uniform`` pads smaller ranks to the largest with directions that change nothing and can be trained;
            ``exact`` keeps every module's own in ``rank_pattern``.
        pad_to: The one rank to pad to, of those that vLLM makes room for: 1, 8, 16, 32, 64, 128, 256, 320 or 512.
        which: The last round, or the best: that of the lowest validation loss.
        push_to_hub: Id of the model on the Hugging Face hub that the folder is uploaded to, once it is written.

    Returns:
        What was written: ``round``, ``rank``, ``modules`` and, where there is one, ``merged`` and the address as
        ``url``.

    Raises:
        ExperimentError: If the run has no checkpoint, the rank is out of range, or ``folder`` exists.
        AdapterError: If ``ranks`` and ``pad_to`` are not allowed or do not fit, or the hub does not take the folder.
    """
    run_folder, folder = Path(run_folder), Path(folder)
    config = read_run_config(run_folder)
    check_export(
        config, run_folder, folder, rank=rank, merged=merged, layout=RankLayout(ranks, pad_to), push_to_hub=push_to_hub
    )
    saved = saved_state(config, run_folder, which)
    adapter, rank = _adapter_and_rank(config, saved, rank)
    is_cut = rank < max(saved.server_ranks.values())
    card = run_card(config, run_folder, saved.server_round, rank, is_cut=is_cut, with_references=True, is_merged=merged)
    if merged:
        base, tokenizer = load_base(config, "cpu")
        merge_into_base(base, tokenizer, adapter, folder, card)
    else:
        revision = config.model.revision
        write_adapter(folder, adapter, base_name(config), ranks=ranks, pad_to=pad_to, revision=revision, card=card)
    written: dict[str, Any] = {"round": saved.server_round, "rank": rank, "modules": len(adapter)}
    if merged:
        written["merged"] = True
    if push_to_hub is not None:
        written["url"] = push_folder(folder, push_to_hub)
    return written


def adapter_of_run(run_folder: Path | str, rank: int | None = None, which: WhichRound = "last") -> AdapterState:
    """Return the global adapter of a run, from a checkpoint and without loading the base model.

    Args:
        run_folder: The folder of a run that has got past round 0.
        rank: In 1 to the server's rank; None takes all of it. Modules whose server rank is smaller keep theirs.
        which: The last round, or the best: that of the lowest validation loss.

    Raises:
        ExperimentError: If the run has no checkpoint or the rank is out of range.
    """
    run_folder = Path(run_folder)
    config = read_run_config(run_folder)
    adapter, _ = _adapter_and_rank(config, saved_state(config, run_folder, which), rank)
    return adapter


def _adapter_and_rank(config: Config, saved: "SavedState", rank: int | None) -> tuple[AdapterState, int]:
    rank = check_rank(rank, max(saved.server_ranks.values()))
    whole = saved.aggregator.broadcast(saved.state, saved.server_ranks)
    return adapter_at_rank(whole, rank, scaling_rule(config)), rank


@dataclass(frozen=True)
class SavedState:
    """The state of a run after a round.

    Attributes:
        aggregator: The method.
        state: Of the method.
        server_ranks: Module path -> the server's rank.
        server_round: After which the state was saved, at least 1.
    """

    aggregator: Aggregator[Any]
    state: Any
    server_ranks: Mapping[str, int]
    server_round: int


def saved_state(config: Config, run_folder: Path, which: WhichRound = "last") -> SavedState:
    """Return the newest state of a run, or that of its best round, without loading the base model.

    Raises:
        ExperimentError: If no round is finished, or none that is wanted was kept.
    """
    check_checkpoints(run_folder)
    aggregator = aggregator_of(config.method, scaling_rule(config))
    checkpoint = load_latest(run_folder / CHECKPOINTS_FOLDER, state_types(aggregator))
    if checkpoint is None or checkpoint.server_round == 0:
        raise ExperimentError(f"{run_folder} has no round to take an adapter from yet; let the run finish one")
    tell_of_later_rounds(run_folder, checkpoint.server_round, config.rounds.checkpoint_every)
    if which == "best":
        checkpoint = best_checkpoint(run_folder, checkpoint, state_types(aggregator))
    server_ranks = dict(checkpoint.progress["server_ranks"])
    return SavedState(aggregator, checkpoint.state, server_ranks, checkpoint.server_round)


def adapter_at_rank(adapter: Broadcast, rank: int, scaling: Scaling, split: Split = "b") -> AdapterState:
    """Return the best approximation of an adapter whose modules have at most this rank (Eckart and Young).

    Whatever the method, the change is cut and not its factors, whose rows are in no particular order.
    """
    factors = {}
    for module, spectrum in adapter_spectra(adapter).items():
        own = min(rank, adapter.trainable[module].rank)
        factors[module] = spectrum.factors(own, scaling(own), split, adapter.trainable[module].A).to(torch.float32)
    return factors


def adapter_spectra(adapter: Broadcast) -> dict[str, Spectrum]:
    """Return the singular value decomposition of each module's change, trained and frozen part together."""
    frozen = adapter.frozen or {}
    spectra = {}
    for module, factors in adapter.adapter.items():
        total = add_product(ProductSum(*factors.shape), factors, 1.0)
        if module in frozen:
            total = add_product(total, frozen[module], 1.0)
        spectra[module] = decompose(total)
    return spectra
