"""Corpora: one file per family, all giving the same examples."""
