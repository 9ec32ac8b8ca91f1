"""Prepares the templates of the pages: where they lie, and how they write numbers."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from flexlora.report.drawing import Chart
from flexlora.report.scores import finite
from flexlora.report.task_differences import interval_text
from flexlora.text import (
    NONE,
    bytes_text,
    count_text,
    describe_ranks,
    number_text,
    percent_text,
    seconds_text,
    signed_text,
)


def environment() -> Environment:
    """Return what renders the templates of this folder: markup escaped, numbers written as on every page."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        number=number_text,
        rate=_rate_text,
        signed=signed_text,
        percent=percent_text,
        bytes=bytes_text,
        duration=seconds_text,
        count=count_text,
        ranks=describe_ranks,
        interval=interval_text,
        readings=_readings,
    )
    return made


def _rate_text(rate: float | None) -> str:
    return NONE if finite(rate) is None else f"{rate:.3g}"


def _readings(chart: Chart) -> list[tuple[float, str, list[tuple[str, str, str]]]]:
    """Return what the page's script shows where the pointer is, as plain lists."""
    return [(reading.x, reading.heading, list(reading.lines)) for reading in chart.readings]
