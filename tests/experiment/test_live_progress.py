"""Live progress: names of users as they are."""

from collections.abc import Callable
from io import StringIO

import pytest
from rich.console import Console
from rich.text import Text

from flexlora.experiment.live_progress import LiveProgress
from flexlora.experiment.stages import Scoring, Stage, Work
from flexlora.rounds.loop_parts import RoundEvent
from flexlora.rounds.records import ClientRecord, RoundRecord


def test_progress_shows_stages_and_clients_as_they_are(
    console: Console,
    shown: Callable[[Console], str],
    names: tuple[str, ...],
    record_of: Callable[..., RoundRecord],
    failed: Callable[[str], ClientRecord],
) -> None:
    with LiveProgress(console, hidden=False) as progress:
        progress(Stage("Training [/on] a", 3, notes=("[/note]",)))
        progress(RoundEvent("cohort", 1, 1))
        for name in names[:4]:
            progress(RoundEvent("client", 1, 1, client=failed(name)))
            progress._bars.refresh()
            assert f"{name} failed" in shown(console)
        progress(RoundEvent("done", 1, 1, record=record_of(1, failed(names[0]))))
    assert "Training [/on] a" in shown(console) and "[/note]" in shown(console)
    assert "first [/red] a/b: [/red] a/b is late" in shown(console)


@pytest.mark.parametrize("width", [60, 120])
def test_every_bar_fits_the_terminal(width: int, failed: Callable[[str], ClientRecord]) -> None:
    console = Console(file=StringIO(), force_terminal=True, color_system=None, width=width)
    with LiveProgress(console, hidden=False) as progress:
        progress(Stage("Federated rounds (aligned)", 24, left=Work(trainings=24, answers=64)))
        progress(RoundEvent("evaluating", 0))
        progress(Scoring(0, 64, "a part with quite a long name, longer than any terminal"))
        progress(Scoring(32, 64, "a part with quite a long name, longer than any terminal"))
        lines = [line.plain for line in rendered(console, progress)]
        assert any("base model" in line for line in lines) and any("32/64 answers" in line for line in lines)
        progress(Scoring(64, 64))
        progress(RoundEvent("cohort", 1, 12))
        progress(RoundEvent("client", 1, 12, client=failed("client-" * 20)))
        lines += [line.plain for line in rendered(console, progress)]
    assert any("1/12 clients" in line for line in lines)
    assert any("whole run" in line and ("left" in line or "nearly done" in line) for line in lines)
    assert max(map(len, lines)) <= width


def rendered(console: Console, progress: LiveProgress) -> list[Text]:
    return [
        Text("".join(segment.text for segment in line)).copy()
        for line in console.render_lines(progress._bars.get_renderable(), pad=False)
    ]


def test_a_log_says_now_and_then_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("flexlora.experiment.live_progress.time.monotonic", lambda: now[0])
    console = Console(file=StringIO(), force_terminal=False, width=200)
    with LiveProgress(console, hidden=False) as progress:
        progress(Stage("Scoring", left=Work(answers=640)))
        for done in range(640 + 1):
            progress(Scoring(done, 640, "unseen tasks"))
            now[0] += 1.0
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    said = [int(line.split(": ")[1].split(" ")[0]) for line in lines if "answers" in line]
    # After 2 s of silence, then after 4, 8, 16, 32 and 60, and each minute from then on.
    assert said == [2, 6, 14, 30, 62, *range(122, 640, 60)]


def test_a_hidden_display_shows_nothing() -> None:
    console = Console(file=StringIO(), force_terminal=True)
    with LiveProgress(console, hidden=True) as progress:
        progress(Stage("Reading data"))
        progress(Scoring(0, 4))
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]
