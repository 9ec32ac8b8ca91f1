"""Live progress: names of users as they are."""

from collections.abc import Callable

from rich.console import Console

from flexlora.experiment.live_progress import LiveProgress
from flexlora.experiment.stages import Stage
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
