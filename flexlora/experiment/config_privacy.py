"""Defines the `privacy` section of a configuration: what others may learn of what clients trained."""

from typing import Literal

from pydantic import Field

from flexlora.experiment.config_differential import DifferentialConfig
from flexlora.experiment.config_section import Section


class SecureSumConfig(Section):
    """Let the server see the sum of a cohort alone (needs the extra `flexlora[privacy]`)."""

    threshold: float = Field(
        default=2 / 3,
        gt=0.5,
        le=1,
        description=(
            "Share of a client's neighbours, itself included, that must survive a round; fewer that collude with the "
            "server cannot take the mask off another client's numbers."
        ),
    )
    num_neighbours: int | None = Field(
        default=None,
        ge=2,
        multiple_of=2,
        description="Clients with whom each client masks what it sends, an even number; null is the whole cohort.",
    )
    word_bits: Literal[16, 24, 32] = Field(
        default=32, description="Bits of a number on its way; fewer are coarser and travel faster."
    )
    largest_change: float | None = Field(
        default=None,
        gt=0,
        description=(
            "How far a round of training at `training.learning_rate` moves an entry of A or B at most; null takes what "
            "the optimiser cannot exceed. Numbers beyond it are clipped and counted."
        ),
    )
    sketch_columns: int | None = Field(
        default=None,
        ge=5,
        description=(
            "Columns of the sketch of a sum of products; null is the largest rank and 8 more. As many as the ranks of "
            "the cohort add up to make it exact."
        ),
    )
    max_bytes: int | None = Field(
        default=None, ge=1, description="Most bytes of the sketch that a client sends; null is no bound."
    )


class PrivacyConfig(Section):
    """What others may learn of what clients trained."""

    secure_sum: SecureSumConfig | None = Field(
        default=None, description="null shows the server every update, a section the sum of a cohort alone."
    )
    differential: DifferentialConfig | None = Field(
        default=None, description="null adds no noise, a section bounds what the model can tell about one client."
    )
