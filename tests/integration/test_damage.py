"""Random damage to what a run leaves, to configurations, models and adapters: noticed or harmless, and never slow.

A smaller version of ``benchmarks/damage.py``, which says what is measured.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "damage.py"

pytestmark = pytest.mark.integration


@pytest.fixture(name="damage", scope="module")
def _damage():
    """Returns the benchmark as a module."""
    spec = importlib.util.spec_from_file_location("benchmark_damage", BENCHMARK)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_flipped_bit_of_a_run_folder_goes_unnoticed(damage, tmp_path, monkeypatch):
    monkeypatch.setattr(damage.run_module, "gather_participants", damage.run_module.gather_participants)
    monkeypatch.setattr(damage.LoadedRun, "load", staticmethod(damage.LoadedRun.load))
    outcomes = damage.fuzz_runs(60, 1, tmp_path)
    assert outcomes.bad == []
    assert outcomes.counts["right"] + outcomes.counts["refused"] == 60 and outcomes.counts["right"] > 20


@pytest.mark.parametrize(("kind", "number"), [("configs", 60), ("models", 20), ("adapters", 40)])
def test_random_damage_is_refused_or_harmless(damage, tmp_path, kind, number):
    outcomes = damage.KINDS[kind](number, 1, tmp_path)
    assert outcomes.bad == []
    assert outcomes.counts["refused"] > number // 5
