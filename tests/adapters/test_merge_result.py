"""What a merge says of itself, as plain values."""

import json
from pathlib import Path

import pytest

from flexlora.adapters.merge import merge


def test_the_result_tells_everything_as_plain_values(mixed: list[Path], tmp_path: Path) -> None:
    result = merge(mixed, rank=2, out=tmp_path / "out")
    plain = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert plain["adapters"] == [str(folder) for folder in mixed]
    assert plain["energy_kept"] == pytest.approx(result.energy_kept)
    module = next(module for module in plain["modules"] if module["path"] == "model.layers.1.self_attn.q_proj")
    assert (module["num_adapters"], module["smallest_rank"], module["largest_rank"]) == (3, 3, 9)
    assert (module["total_rank"], module["rank"], module["shape"]) == (16, 2, [32, 32])
    assert module["certificate"]["error"] >= module["certificate"]["optimal"] > 0
    assert plain["modules"][0]["path"].endswith("layers.0.self_attn.q_proj")
