"""Writes a table in Markdown."""

from collections.abc import Iterator, Sequence


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table: the first column as code and to the left, the others to the right."""
    yield f"| {' | '.join(columns)} |"
    yield f"| --- |{' ---: |' * (len(columns) - 1)}"
    for first, *rest in rows:
        yield f"| {' | '.join([f'`{first}`', *rest])} |".replace("\u202f", " ")
