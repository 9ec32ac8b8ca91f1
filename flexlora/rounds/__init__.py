"""The algorithm: the round loop, its virtual clock, records and checkpoints."""
