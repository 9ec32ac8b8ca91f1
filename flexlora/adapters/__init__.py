"""PEFT adapter folders without a federation: read, write, merge, inspect."""
