"""Turns the rows of a comparison into paired statistics."""

from flexlora.report.chosen_rates import ChosenRate, chosen_rates
from flexlora.report.study_rows import ROWS_FILE, Row, StudyError, read_rows

__all__ = ["ROWS_FILE", "ChosenRate", "Row", "StudyError", "chosen_rates", "read_rows"]
