"""Makes consoles that show control characters of names as text instead of obeying them."""

from collections.abc import Iterable
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from flexlora.text import printable


class PlainConsole(Console):
    """A console on which names from files of others cannot move the cursor, change colours or set the title."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield what is shown, control characters in its texts escaped; those of rich itself are no texts."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(printable(segment.text, keep_lines=True), segment.style)


def plain_console(*, stderr: bool = False, file: TextIO | None = None) -> PlainConsole:
    """Return a console for this package's messages: without emoji, as a client may be called ``task:100:a``."""
    return PlainConsole(emoji=False, stderr=stderr, file=file)
