"""Bars move in terminals, and in notebooks that have widgets."""

import importlib.util
from io import StringIO

import pytest
from rich.console import Console
from rich.progress import TextColumn

from flexlora.progress import moving_bar


def is_silent(console: Console, *, hidden: bool = False) -> bool:
    return moving_bar(console, TextColumn(""), hidden=hidden).disable


def test_a_bar_moves_in_a_terminal_and_nowhere_when_hidden() -> None:
    terminal, file = Console(file=StringIO(), force_terminal=True), Console(file=StringIO(), force_terminal=False)
    assert not is_silent(terminal)
    assert is_silent(terminal, hidden=True) and is_silent(file)


@pytest.mark.parametrize("has_widgets", [True, False])
def test_a_bar_moves_in_a_notebook_that_has_widgets(monkeypatch: pytest.MonkeyPatch, has_widgets: bool) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if has_widgets else None)
    notebook = Console(file=StringIO(), force_jupyter=True)
    assert is_silent(notebook) is not has_widgets
    assert is_silent(notebook, hidden=True)
