"""How a command ends that is told to by others."""

import os
import signal

import pytest

from flexlora.errors import FlexLoraError
from flexlora.verbs.leaving import EXIT_INTERRUPTED, EXIT_WRONG_INPUT, ended_by_sigterm, guarded, interruptible


def test_sigterm_ends_a_command_as_an_interruption_does(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def command() -> None:
        with ended_by_sigterm(), interruptible("it goes on later"):
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()

    assert guarded(command) == EXIT_INTERRUPTED
    assert signal.getsignal(signal.SIGTERM) == before


def test_control_characters_of_others_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise FlexLoraError("the server answers \x1b[2J")

    assert guarded(command) == EXIT_WRONG_INPUT
    assert "\x1b[2J" not in capsys.readouterr().err
