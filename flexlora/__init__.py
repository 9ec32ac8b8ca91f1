"""Federated fine-tuning of one language model across clients of different LoRA ranks.

    from pathlib import Path
    from flexlora import load_config, run_experiment

    result = run_experiment(load_config("configs/demo.yaml"), Path("runs/demo"))

Public names are imported when they are first asked for: importing the package itself is cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flexlora.adapters import read_adapter, write_adapter
    from flexlora.aggregators import AGGREGATORS
    from flexlora.aggregators.base import Aggregator
    from flexlora.clients import Broadcast, ClientFailure, ClientSpec, RankPlan, Update
    from flexlora.config import Config, ConfigError, dump_config, load_config, parse_config
    from flexlora.engines.base import Engine
    from flexlora.experiment import RunResult, evaluate_run, export_run, run_experiment
    from flexlora.inspection import inspect_adapter
    from flexlora.lora.certificate import Certificate
    from flexlora.lora.factors import AdapterState, LoraFactors, Scaling
    from flexlora.lora.product import (
        ProductSum,
        Spectrum,
        add_product,
        certified_decomposition,
        certified_decompositions,
    )
    from flexlora.merging import MergeResult, merge
    from flexlora.planning import Plan, plan_experiment
    from flexlora.report.page import write_report
    from flexlora.report.records import RoundRecord, read_records
    from flexlora.uplink.base import UplinkStep

__version__ = "0.1.0"

__all__ = [
    "AGGREGATORS",
    "AdapterState",
    "Aggregator",
    "Broadcast",
    "Certificate",
    "ClientFailure",
    "ClientSpec",
    "Config",
    "ConfigError",
    "Engine",
    "FlexLoraError",
    "LoraFactors",
    "MergeResult",
    "Plan",
    "ProductSum",
    "RankPlan",
    "RoundRecord",
    "RunResult",
    "Scaling",
    "Spectrum",
    "Update",
    "UplinkStep",
    "__version__",
    "add_product",
    "certified_decomposition",
    "certified_decompositions",
    "dump_config",
    "evaluate_run",
    "export_run",
    "inspect_adapter",
    "load_config",
    "merge",
    "parse_config",
    "plan_experiment",
    "read_adapter",
    "read_records",
    "run_experiment",
    "write_adapter",
    "write_report",
]

_NAMES = {
    "flexlora.adapters": ("read_adapter", "write_adapter"),
    "flexlora.aggregators": ("AGGREGATORS",),
    "flexlora.aggregators.base": ("Aggregator",),
    "flexlora.clients": ("Broadcast", "ClientFailure", "ClientSpec", "RankPlan", "Update"),
    "flexlora.config": ("Config", "ConfigError", "dump_config", "load_config", "parse_config"),
    "flexlora.engines.base": ("Engine",),
    "flexlora.experiment": ("RunResult", "evaluate_run", "export_run", "run_experiment"),
    "flexlora.inspection": ("inspect_adapter",),
    "flexlora.lora.certificate": ("Certificate",),
    "flexlora.lora.factors": ("AdapterState", "LoraFactors", "Scaling"),
    "flexlora.lora.product": (
        "ProductSum",
        "Spectrum",
        "add_product",
        "certified_decomposition",
        "certified_decompositions",
    ),
    "flexlora.merging": ("MergeResult", "merge"),
    "flexlora.planning": ("Plan", "plan_experiment"),
    "flexlora.report.page": ("write_report",),
    "flexlora.report.records": ("RoundRecord", "read_records"),
    "flexlora.uplink.base": ("UplinkStep",),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}


class FlexLoraError(Exception):
    """Base of every error raised on purpose; its message names the rule, the value and the fix."""


if not TYPE_CHECKING:  # A type checker would take any name for granted.

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_HOMES[name]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
