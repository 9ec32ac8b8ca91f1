"""Ways to get a cohort trained, behind one protocol."""
