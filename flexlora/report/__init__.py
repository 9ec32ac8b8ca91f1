"""Run folders become a page, tables and comparisons; no torch."""
