"""Federated fine-tuning of one language model across clients of different LoRA ranks.

    import flexlora

    result = flexlora.run("demo", rounds={"num_rounds": 3})
    result.scores()

Public names are imported when they are first asked for: importing the package itself is cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import flexlora.testing as testing  # noqa: F401
    import flexlora.trainers as trainers  # noqa: F401
    from flexlora.adapters.folder import read_adapter
    from flexlora.adapters.inspection import inspect_adapter
    from flexlora.adapters.merge import merge
    from flexlora.adapters.merge_result import MergeResult
    from flexlora.adapters.write import write_adapter
    from flexlora.aggregators.base import AggregationError, Aggregator, require_server_ranks, state_types, weighed
    from flexlora.aggregators.registry import AGGREGATORS, aggregation_method
    from flexlora.aggregators.settings import Traits, option
    from flexlora.data.examples import Example
    from flexlora.data.owned_examples import OwnedExample
    from flexlora.data.pretraining import EMBEDDED_BASE, resolve_base_model
    from flexlora.engines.base import Engine, Parcel, RoundOrder
    from flexlora.engines.exchange_loop import patch
    from flexlora.errors import FlexLoraError
    from flexlora.experiment.config import Config, ConfigError
    from flexlora.experiment.config_file import dump_config, load_config, parse_config
    from flexlora.experiment.estimate import Plan, plan_experiment
    from flexlora.experiment.export import export_run
    from flexlora.experiment.notebook import run
    from flexlora.experiment.result import RunResult, open_run
    from flexlora.experiment.run import run_experiment
    from flexlora.experiment.score_run import evaluate_run
    from flexlora.federation.clients import ClientSpec, RankPlan
    from flexlora.federation.known_rows import known_rows, mask_of
    from flexlora.federation.messages import Broadcast, Change, ClientFailure, SparseMask, TailPenalty, Update
    from flexlora.lora.certificate import Certificate
    from flexlora.lora.factors import AdapterState, LoraFactors, Scaling
    from flexlora.lora.product import (
        ProductSum,
        Spectrum,
        add_product,
        certified_decomposition,
        certified_decompositions,
        spectrum_of,
    )
    from flexlora.report.page import write_report
    from flexlora.rounds.loop import run_rounds
    from flexlora.rounds.loop_parts import Evaluator, Federation, Loop, Outcome, RoundSettings
    from flexlora.rounds.records import EvaluationRecord, RoundRecord, ScoreRecord, read_records
    from flexlora.uplink.base import UplinkStep

__version__ = "0.1.0"

__all__ = [
    "AGGREGATORS",
    "EMBEDDED_BASE",
    "AdapterState",
    "AggregationError",
    "Aggregator",
    "Broadcast",
    "Certificate",
    "Change",
    "ClientFailure",
    "ClientSpec",
    "Config",
    "ConfigError",
    "Engine",
    "EvaluationRecord",
    "Evaluator",
    "Example",
    "Federation",
    "FlexLoraError",
    "Loop",
    "LoraFactors",
    "MergeResult",
    "Outcome",
    "OwnedExample",
    "Parcel",
    "Plan",
    "ProductSum",
    "RankPlan",
    "RoundOrder",
    "RoundRecord",
    "RoundSettings",
    "RunResult",
    "Scaling",
    "ScoreRecord",
    "SparseMask",
    "Spectrum",
    "TailPenalty",
    "Traits",
    "Update",
    "UplinkStep",
    "__version__",
    "add_product",
    "aggregation_method",
    "certified_decomposition",
    "certified_decompositions",
    "dump_config",
    "evaluate_run",
    "export_run",
    "inspect_adapter",
    "known_rows",
    "load_config",
    "mask_of",
    "merge",
    "open_run",
    "option",
    "parse_config",
    "patch",
    "plan_experiment",
    "read_adapter",
    "read_records",
    "require_server_ranks",
    "resolve_base_model",
    "run",
    "run_experiment",
    "run_rounds",
    "spectrum_of",
    "state_types",
    "weighed",
    "write_adapter",
    "write_report",
]

_NAMES = {
    "flexlora.adapters.folder": ("read_adapter",),
    "flexlora.adapters.inspection": ("inspect_adapter",),
    "flexlora.adapters.merge": ("merge",),
    "flexlora.adapters.merge_result": ("MergeResult",),
    "flexlora.adapters.write": ("write_adapter",),
    "flexlora.aggregators.base": ("AggregationError", "Aggregator", "require_server_ranks", "state_types", "weighed"),
    "flexlora.aggregators.registry": ("AGGREGATORS", "aggregation_method"),
    "flexlora.aggregators.settings": ("Traits", "option"),
    "flexlora.data.examples": ("Example",),
    "flexlora.data.owned_examples": ("OwnedExample",),
    "flexlora.data.pretraining": ("EMBEDDED_BASE", "resolve_base_model"),
    "flexlora.engines.base": ("Engine", "Parcel", "RoundOrder"),
    "flexlora.engines.exchange_loop": ("patch",),
    "flexlora.errors": ("FlexLoraError",),
    "flexlora.experiment.config": ("Config", "ConfigError"),
    "flexlora.experiment.config_file": ("dump_config", "load_config", "parse_config"),
    "flexlora.experiment.estimate": ("Plan", "plan_experiment"),
    "flexlora.experiment.export": ("export_run",),
    "flexlora.experiment.notebook": ("run",),
    "flexlora.experiment.result": ("RunResult", "open_run"),
    "flexlora.experiment.run": ("run_experiment",),
    "flexlora.experiment.score_run": ("evaluate_run",),
    "flexlora.federation.clients": ("ClientSpec", "RankPlan"),
    "flexlora.federation.known_rows": ("known_rows", "mask_of"),
    "flexlora.federation.messages": (
        "Broadcast",
        "Change",
        "ClientFailure",
        "SparseMask",
        "TailPenalty",
        "Update",
    ),
    "flexlora.lora.certificate": ("Certificate",),
    "flexlora.lora.factors": ("AdapterState", "LoraFactors", "Scaling"),
    "flexlora.lora.product": (
        "ProductSum",
        "Spectrum",
        "add_product",
        "certified_decomposition",
        "certified_decompositions",
        "spectrum_of",
    ),
    "flexlora.report.page": ("write_report",),
    "flexlora.rounds.loop": ("run_rounds",),
    "flexlora.rounds.loop_parts": ("Evaluator", "Federation", "Loop", "Outcome", "RoundSettings"),
    "flexlora.rounds.records": ("EvaluationRecord", "RoundRecord", "ScoreRecord", "read_records"),
    "flexlora.uplink.base": ("UplinkStep",),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}
_MODULES = ("testing", "trainers")


if not TYPE_CHECKING:  # A type checker would take any name for granted.

    def __getattr__(name: str) -> object:
        if name in _MODULES:
            return import_module(f"flexlora.{name}")
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_HOMES[name]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, *_MODULES})
