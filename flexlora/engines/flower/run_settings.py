"""Defines what the server tells every client about its run, in each request.

A client that lost its memory can so answer any request. Nothing here makes a client read a file, load a model or run
code that its own user has not named.
"""

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flexlora.data.prompt_templates import Template
from flexlora.data.prompts import LossOn
from flexlora.engines.flower.envelope import EnvelopeError
from flexlora.training.one_client import LocalTraining
from flexlora.uplink.compression import Compression
from flexlora.uplink.wire import WireDtype

_Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
_NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class LocalTrainingRecord(BaseModel):
    """``LocalTraining`` as it travels."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    optimizer: Literal["adamw", "sgd"]
    batch_size: int = Field(ge=1, le=1_000_000)
    gradient_accumulation_steps: int = Field(ge=1, le=1_000_000)
    num_epochs: float = Field(gt=0, le=1_000_000, allow_inf_nan=False)
    max_steps: int | None = Field(ge=1)
    max_grad_norm: float | None = Field(gt=0, allow_inf_nan=False)
    weight_decay: _NotNegative
    momentum: _Fraction
    betas: tuple[_Fraction, _Fraction]
    proximal: _NotNegative

    def settings(self) -> LocalTraining:
        """Return what clients train with."""
        return LocalTraining(**self.model_dump())


class RunSettings(BaseModel):
    """The part of a run's configuration that its clients need.

    Attributes:
        run_id: Name of the run, the same after the server was restarted.
        seed: Of the run.
        base_model: Public name of the base model.
        base_sha256: Of its stored weights (``base_digest``).
        dtype: Of its weights in memory, unless the client's user has chosen another.
        dropout: On the input of the adapters.
        largest_rank: The largest rank that a client may choose.
        target_modules: ``all-linear`` or endings of module names.
        scaling: Rule that turns a rank into a scaling.
        lora_alpha: See ``scaling``.
        template: Prompt format.
        max_length: Longest sequence in tokens.
        loss_on: Tokens that the loss looks at.
        columns: Our column name -> that of the clients' data.
        label_column: Column with labels, None without.
        unseen_labels: Labels whose rows no client trains on.
        wire_dtype: Dtype of factors on their way.
        upload_bits: Of a number on its way to the server, where updates are compressed.
        error_feedback: Whether clients add what that loses to their next update.
        training: How clients train.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    run_id: str = Field(min_length=1, max_length=200)
    seed: int = Field(ge=0)
    base_model: str
    base_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    dtype: Literal["float32", "bfloat16"]
    dropout: _Fraction
    largest_rank: int = Field(ge=1)
    target_modules: Literal["all-linear"] | tuple[str, ...]
    scaling: Literal["constant_alpha", "constant_ratio", "rslora"]
    lora_alpha: float = Field(gt=0, allow_inf_nan=False)
    template: Template
    max_length: int = Field(ge=16, le=10_000_000)
    loss_on: LossOn
    columns: dict[str, str] = {}
    label_column: str | None = None
    unseen_labels: tuple[str, ...] = ()
    wire_dtype: WireDtype
    upload_bits: Literal[8, 4] | None = None
    error_feedback: bool = False
    training: LocalTrainingRecord

    @property
    def compression(self) -> Compression | None:
        """How updates are made smaller than ``wire_dtype``."""
        return None if self.upload_bits is None else Compression(self.upload_bits, self.error_feedback)


def training_record(settings: LocalTraining) -> LocalTrainingRecord:
    """Return how clients train, for their server to send."""
    return LocalTrainingRecord(**dataclasses.asdict(settings))


def read_run_settings(fields: Any) -> RunSettings:
    """Return the settings that a request carries as plain values.

    Raises:
        EnvelopeError: Naming the first one that is wrong.
    """
    try:
        return RunSettings.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "run"
        raise EnvelopeError(f"a request must carry the settings of its run; {where}: {first['msg']}") from None
