"""Shades of heat maps, and that no name can break out of them."""

from flexlora.report.spectra_charts import heat_class, heatmap


def test_names_are_escaped() -> None:
    heat = heatmap(["<script>"], [1], [[0.5]], 1.0)
    assert "<script>" not in heat.svg
    assert "&lt;script&gt;" in heat.svg


def test_heat_has_ten_shades_and_an_outline_for_nothing() -> None:
    assert [heat_class(share, 0.5) for share in (0.0, 0.049, 0.05, 0.5, None)] == [
        "h0",
        "h0",
        "h1",
        "h9",
        "none",
    ]
