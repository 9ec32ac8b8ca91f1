"""Defines the configuration of a run: sections of settings, each with its description."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny

from flexlora.errors import FlexLoraError
from flexlora.experiment.config_clients import ClientsConfig, ClockConfig, DevicesConfig
from flexlora.experiment.config_data import DataConfig, GeneratedData
from flexlora.experiment.config_deployment import DeploymentConfig
from flexlora.experiment.config_privacy import PrivacyConfig
from flexlora.experiment.config_robust import RobustConfig
from flexlora.experiment.config_section import Section
from flexlora.experiment.method_config import MethodConfig, read_method

MOST_PROBLEMS = 12
"""Problems that the message of a `ConfigError` lists."""


class ConfigError(FlexLoraError, ValueError):
    """One or more settings are wrong; the message lists the first of them and says how many there are.

    Attributes:
        problems: All that were found.
    """

    def __init__(self, problems: Sequence[str], source: str) -> None:
        self.problems = tuple(problems)
        noun = "problem" if len(problems) == 1 else "problems"
        more = len(problems) - MOST_PROBLEMS
        lines = [f"  - {problem}" for problem in problems[:MOST_PROBLEMS]]
        super().__init__(
            f"{len(problems)} {noun} in {source}:", *lines, *([f"  and {more:,} more"] if more > 0 else [])
        )


class ModelConfig(Section):
    """The base model, shared by all clients and never changed."""

    name_or_path: str = Field(
        default="embedded",
        description="`embedded`, a local folder in Hugging Face format, a hub id such as `org/model`, or a GGUF file: "
        "a local one, or `org/model/file.gguf`.",
    )
    revision: str | None = Field(
        default=None, description="Hub revision (branch, tag or commit); null is the default branch."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Type of the base weights; LoRA factors are trained in float32 either way."
    )
    quantization: Literal["8bit", "4bit"] | None = Field(
        default=None,
        description=(
            "Store the weights of linear modules in 8 or 4 bits (NF4); needs the extra `flexlora[bitsandbytes]`. "
            "Clients then train one at a time, and the adapter cannot be merged into the base."
        ),
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description=(
            "Compute activations a second time instead of keeping them: less memory, more time, the same results. "
            "Clients then train one at a time."
        ),
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="`auto` (CUDA if there is one), `cpu`, `cuda` or `cuda:N`.",
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] | None = Field(
        default=None, description="Attention kernel; null leaves the choice to transformers, by architecture."
    )
    trust_remote_code: bool = Field(default=False, description="Let a hub repository run its own model code.")
    num_threads: int | None = Field(
        default=None,
        ge=1,
        description=(
            "CPU threads for tensor work in each process; null leaves the choice to PyTorch, but clients of a base of "
            "at most 200 million parameters train with one."
        ),
    )
    num_processes: int | None = Field(
        default=None,
        ge=1,
        description=(
            "Processes that train clients, with one copy of the base weights on the CPU; null is one per GPU, or one "
            "per `model.num_threads` cores where the base has at most 200 million parameters, else 1. Results depend "
            "on threads, not on this."
        ),
    )
    clients_per_group: int | None = Field(
        default=None,
        ge=1,
        description="Most clients that share passes through the base; null decides by tokens and memory, 1 is one.",
    )


class RayConfig(Section):
    """Train clients on a Ray cluster instead of this machine's processes (needs the extra `flexlora[ray]`)."""

    address: str | None = Field(
        default=None,
        description="Of a running cluster, `auto` for the one this machine belongs to, null to start one here.",
    )
    num_actors: int | None = Field(
        default=None, ge=1, description="Copies of the base that train; null is as many as the cluster has room for."
    )
    cpus_per_actor: int = Field(default=1, ge=1, description="Cores, and threads, of an actor.")
    gpus_per_actor: float = Field(default=0.0, ge=0, description="GPUs of an actor; 0 trains on CPUs.")


class LoraConfig(Section):
    """Where adapters sit and how rank turns into scaling."""

    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        default="all-linear", description="`all-linear`, or a list of module name endings such as `[q_proj, v_proj]`."
    )
    scaling: Literal["constant_alpha", "constant_ratio", "rslora"] = Field(
        default="constant_alpha",
        description=(
            "Factor in front of B A: `constant_alpha` is lora_alpha / rank (PEFT, the paper), `constant_ratio` is "
            "lora_alpha at every rank, `rslora` is lora_alpha / sqrt(rank)."
        ),
    )
    lora_alpha: float = Field(default=16.0, gt=0, description="See `lora.scaling`.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout probability on the input of the adapters.")


class TrainingConfig(Section):
    """Local training of one client in one round."""

    optimizer: Literal["adamw", "sgd"] = Field(
        default="adamw",
        description=("Fresh for each client in each round; a method that prescribes one (FedAvg: SGD) overrides this."),
    )
    learning_rate: float = Field(default=1e-3, gt=0, description="Learning rate of round 1 (after warm-up).")
    schedule: Literal["constant", "linear", "cosine", "halve"] = Field(
        default="constant", description="Learning rate over rounds; `halve` divides by two at each of `halve_at`."
    )
    final_learning_rate: float = Field(
        default=0.0,
        ge=0,
        description="What `linear` and `cosine` would reach one round after the last.",
    )
    halve_at: tuple[int, ...] = Field(default=(15,), description="Rounds at which `schedule: halve` divides by two.")
    warmup_rounds: int = Field(default=0, ge=0, description="Rounds over which the learning rate rises linearly.")
    num_epochs: float = Field(default=1.0, gt=0, description="Passes over the client's examples per round.")
    max_steps: int | None = Field(
        default=None, ge=1, description="Upper limit of optimiser steps per client and round."
    )
    batch_size: int = Field(default=4, ge=1, description="Examples per forward pass.")
    gradient_accumulation_steps: int = Field(default=1, ge=1, description="Forward passes per optimiser step.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled for AdamW.")
    momentum: float = Field(default=0.0, ge=0, lt=1, description="Momentum of SGD.")
    max_grad_norm: float | None = Field(
        default=1.0, gt=0, description="Norm at which gradients are clipped; null never."
    )
    proximal: float = Field(
        default=0.0,
        ge=0,
        description=(
            "FedProx's mu: adds mu / 2 times the squared distance of each module's change from where the client "
            "started; a training loop of your own has to add it itself."
        ),
    )


class RoundsConfig(Section):
    """The federated loop."""

    num_rounds: int = Field(default=20, ge=1, description="Number of server rounds.")
    cohort_size: int | None = Field(default=None, ge=1, description="Clients per round; null uses `cohort_fraction`.")
    cohort_fraction: float = Field(
        default=0.05, gt=0, le=1, description="Share of the clients per round; the paper uses 0.05."
    )
    sampling: Literal["fixed", "poisson"] = Field(
        default="fixed",
        description=(
            "`fixed` draws cohorts of one size; `poisson` draws each client on its own, so that sizes vary around it "
            "and the accounting of `privacy.differential` is tighter."
        ),
    )
    robust: RobustConfig | None = Field(default=None, description="null believes every client.")
    keep_checkpoints: int = Field(default=2, ge=1, description="Newest checkpoints kept.")
    checkpoint_every: int = Field(
        default=1,
        ge=1,
        description="Rounds between checkpoints; one is on disk before its round is evaluated, should that fail.",
    )
    patience: int | None = Field(
        default=None, ge=1, description="Stop after this many evaluations without a lower validation loss; null never."
    )
    min_updates: int = Field(
        default=1, ge=1, description="Fewest usable updates that a round steps from; with fewer its state is kept."
    )
    max_failed_rounds: int = Field(
        default=3,
        ge=1,
        description="End the run, with an error, after this many rounds in a row without a usable update.",
    )
    wire_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Type in which factors travel."
    )
    upload_bits: Literal[8, 4] | None = Field(
        default=None,
        description=(
            "Bits per number in what clients send: what training changed is rounded at random, right on average. Null "
            "is `wire_dtype`."
        ),
    )
    error_feedback: bool = Field(
        default=False,
        description=(
            "Clients add what `upload_bits` lost of their product to their next update; not for methods whose clients "
            "keep a factor."
        ),
    )


class EvaluationConfig(Section):
    """What is scored, how often, and against what."""

    every: int = Field(default=5, ge=1, description="Rounds between evaluations; the last round always has one.")
    max_new_tokens: int = Field(default=32, ge=1, description="Longest generated answer in tokens.")
    batch_size: int = Field(default=64, ge=1, description="Prompts decoded at once.")
    keep_answers: bool = Field(
        default=True, description="Keep what models answered to unseen tasks in answers.jsonl, for the report."
    )
    rank_group_clients: int = Field(
        default=30,
        ge=0,
        description=(
            "Clients per type whose own test data are scored at the end, at least 30 for the report to say who gains; "
            "0 skips it."
        ),
    )
    local_only_clients: int = Field(
        default=8, ge=0, description="Sampled clients that also train alone, for comparison; 0 skips it."
    )
    local_only_epochs: float = Field(
        default=3.0, gt=0, description="Passes over their examples when clients train alone."
    )
    fedit_reference: bool = Field(
        default=True, description="Also run FedIT with every client at the smallest rank, same seed and rounds."
    )
    fedit_learning_rate: float | None = Field(
        default=None,
        gt=0,
        description="Learning rate of that reference, which a small rank may want larger; null is the run's own.",
    )
    fedit_largest_reference: bool = Field(
        default=False,
        description="Also run FedIT with every client at the largest rank: what it would be if all could afford it.",
    )
    fedit_largest_learning_rate: float | None = Field(
        default=None, gt=0, description="Learning rate of that reference; null is the run's own."
    )
    large_alone_reference: bool = Field(
        default=False,
        description=(
            "Also run FedIT among the clients that can afford the largest ranks alone, cohorts smaller by their share."
        ),
    )
    large_alone_learning_rate: float | None = Field(
        default=None, gt=0, description="Learning rate of that reference; null is the run's own."
    )
    target_rouge_l: float | None = Field(
        default=None,
        ge=0,
        le=100,
        description="Unseen ROUGE-L whose virtual time the report gives; null is the best of the weakest that learned.",
    )


MethodSection = Annotated[SerializeAsAny[MethodConfig], BeforeValidator(read_method)]


class Config(Section):
    """One run."""

    seed: int = Field(default=0, ge=0, description="Seed of everything random but the generated corpus.")
    model: ModelConfig = Field(default_factory=ModelConfig)
    ray: RayConfig | None = Field(
        default=None,
        description=(
            "null trains in processes of this machine, a section on a cluster; `model.num_processes` then counts for "
            "nothing."
        ),
    )
    lora: LoraConfig = Field(default_factory=LoraConfig)
    data: DataConfig = Field(default_factory=GeneratedData)
    clients: ClientsConfig = Field(default_factory=ClientsConfig)
    devices: DevicesConfig = Field(default_factory=DevicesConfig)
    clock: ClockConfig = Field(default_factory=ClockConfig)
    deployment: DeploymentConfig = Field(default_factory=DeploymentConfig)
    method: MethodSection = Field(default_factory=lambda: read_method({}))
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    rounds: RoundsConfig = Field(default_factory=RoundsConfig)
    privacy: PrivacyConfig = Field(default_factory=PrivacyConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
