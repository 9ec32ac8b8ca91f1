"""Trains a base model with LoRA, one client or many in one pass, and scores it."""
