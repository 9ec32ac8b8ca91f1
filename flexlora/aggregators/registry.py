"""Aggregation methods by the name a configuration uses, and what their states are made of."""

from flexlora.aggregators.fedit import FedIt, FedItState
from flexlora.aggregators.flexlora import FlexLora, FlexLoraState
from flexlora.aggregators.zero_pad import ZeroPad, ZeroPadState
from flexlora.lora.factors import LoraFactors
from flexlora.lora.product import Spectrum

AGGREGATORS: dict[str, type[FedIt] | type[ZeroPad] | type[FlexLora]] = {
    "fedit": FedIt,
    "zero_pad": ZeroPad,
    "flexlora": FlexLora,
}
"""Constructed as ``AGGREGATORS[name](scaling=..., **options)``; the fields of the dataclass are the options."""


STATE_TYPES: tuple[type, ...] = (FedItState, ZeroPadState, FlexLoraState, LoraFactors, Spectrum)
"""Every dataclass that may occur in a state: a checkpoint writes these by name and reads no others."""
