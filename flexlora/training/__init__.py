"""How a base model with LoRA learns and is scored: one client, many in one pass, evaluation."""
