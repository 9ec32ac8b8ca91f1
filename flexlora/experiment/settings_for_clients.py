"""Picks the part of a run's settings that its clients are told, on Flower and over files."""

from collections.abc import Mapping

from flexlora.engines.flower.run_settings import RunSettings, training_record
from flexlora.experiment.base import base_name
from flexlora.experiment.config import Config
from flexlora.experiment.config_data import InstructionsData
from flexlora.experiment.workload import local_training
from flexlora.federation.clients import RankPlan


def settings_for_clients(
    config: Config,
    *,
    run_id: str,
    base_sha256: str,
    plans: Mapping[str, RankPlan],
    shapes: Mapping[str, tuple[int, int]],
) -> RunSettings:
    """Return what clients are told.

    Args:
        config: The run.
        run_id: What tells it from any other.
        base_sha256: Digest of the base's weights.
        plans: Name -> rank plan that some client may have.
        shapes: Module path -> (out_features, in_features) of the modules that may have an adapter.
    """
    data = config.data
    rows = data if isinstance(data, InstructionsData) else None
    return RunSettings(
        run_id=run_id,
        seed=config.seed,
        base_model=base_name(config),
        base_sha256=base_sha256,
        dtype=config.model.dtype,
        dropout=config.lora.dropout,
        largest_rank=max(rank for plan in plans.values() for rank in plan.resolve(shapes).values()),
        target_modules=config.lora.target_modules,
        scaling=config.lora.scaling,
        lora_alpha=config.lora.lora_alpha,
        template=data.template,
        max_length=data.max_length,
        loss_on=data.loss_on,
        columns={} if rows is None else rows.columns,
        label_column=None if rows is None else rows.label_column,
        unseen_labels=() if rows is None else rows.unseen_labels,
        wire_dtype=config.rounds.wire_dtype,
        upload_bits=config.rounds.upload_bits,
        error_feedback=config.rounds.error_feedback,
        training=training_record(local_training(config)),
    )
