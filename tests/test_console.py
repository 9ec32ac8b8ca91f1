"""Names from files of others reach a terminal as text, whatever is in them."""

import io

import pytest
from rich.table import Table
from rich.text import Text

from flexlora.console import plain_console
from flexlora.errors import FlexLoraError
from flexlora.text import printable

CONTROLS = "".join(map(chr, (*range(0x20), *range(0x7F, 0xA0))))


def shown(thing: object, **options: object) -> str:
    file = io.StringIO()
    console = plain_console(file=file)
    console.width = 500
    console.print(thing, markup=False, highlight=False, **options)  # type: ignore[arg-type]
    return file.getvalue()


def controls_in(text: str) -> set[str]:
    return set(text) & (set(CONTROLS) - {"\n"})


@pytest.mark.parametrize("make", [str, Text, lambda name: _table(name)], ids=["text", "rich text", "cell"])
def test_no_control_character_is_printed(make) -> None:
    for control in CONTROLS:
        assert controls_in(shown(make(f"layer{control}[31mname"))) == set()
    # A column is as wide as the name was before it was escaped.
    assert "layer\\x1b]0" in shown(make("layer\x1b]0;title"))
    assert "a\\x9bb" in shown(make("a\x9bb"))


def _table(name: str) -> Table:
    table = Table("module")
    table.add_row(Text(name))
    return table


def test_styles_of_our_own_still_work() -> None:
    file = io.StringIO()
    console = plain_console(file=file)
    console._force_terminal, console._color_system = True, console._detect_color_system()
    console.print("[bold]a[/]\nb")
    assert file.getvalue().replace("\x1b[1m", "").replace("\x1b[0m", "") == "a\nb\n"


def test_an_error_escapes_the_names_in_it_and_has_one_line_for_each_argument() -> None:
    error = FlexLoraError("2 problems in \x1b[2Jname:", "  - one\r", "  - two\x85\nError: fake")
    assert str(error) == "2 problems in \\x1b[2Jname:\n  - one\\x0d\n  - two\\x85\\x0aError: fake"
    assert str(FlexLoraError("a\nError: fake")) == "a\\x0aError: fake"


def test_what_can_be_printed_stays() -> None:
    assert printable("größe – 层.0 🙂") == "größe – 层.0 🙂"
    assert printable("a\nb") == "a\\x0ab" and printable("a\nb", keep_lines=True) == "a\nb"
