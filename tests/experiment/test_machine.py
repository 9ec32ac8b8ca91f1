"""The machine of a run in words."""

from pathlib import Path

import pytest
import torch

from flexlora.experiment import machine
from flexlora.experiment.machine import machine_in_words


def test_the_processor_is_named_as_the_system_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nmodel name\t: AMD EPYC  7763 64-Core Processor\nprocessor : 1\nmodel name : X\n")
    monkeypatch.setattr(machine, "CPU_INFO", info)
    assert machine_in_words(torch.device("cpu")).startswith("AMD EPYC 7763 64-Core Processor, ")
    monkeypatch.setattr(machine, "CPU_INFO", tmp_path / "none")
    assert " core" in machine_in_words(torch.device("cpu"))
