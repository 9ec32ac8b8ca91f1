"""Corpora, from files and generated, turned into the same examples, dealt to clients and tokenised."""
