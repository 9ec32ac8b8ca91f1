"""Rules know the smallest cohorts in which they hold."""

import pytest

from flexlora.uplink.robust_settings import RobustSettings, least_clients


@pytest.mark.parametrize(
    ("rule", "least"),
    # Krum needs n > 2 f + 2 (arXiv:1703.02757); a majority of honest clients, or groups, is enough for the others.
    [("norm_bound", 1), ("krum", 9), ("multi_krum", 9), ("trimmed_mean", 7), ("median_of_means", 7)],
)
def test_against_three_liars_a_rule_needs_so_many_clients(rule: str, least: int) -> None:
    assert least_clients(RobustSettings(rule, 3)) == least  # type: ignore[arg-type]
