"""Federated fine-tuning of one language model across clients of different LoRA ranks."""

__version__ = "0.1.0"


class FlexLoraError(Exception):
    """Base of every error raised on purpose; its message names the rule, the value and the fix."""
