"""The embedded corpus: thousands of small text tasks in the schema of Super-Natural Instructions, from a seed.

Every task computes something no other task computes. Tasks share primitives (list steps, word tables, scenes), so that
what is learned on some helps on others; they differ in the adapter rank they need, from a change of layout to the
dictionary of an invented language. ``tasks`` puts them together.
"""
