"""The verbs of the command line, one file each: what a person types, and what the terminal shows."""
