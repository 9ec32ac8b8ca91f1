"""Pictures of adapters: what they say, that every format can be read, and that a failure leaves nothing."""

import re
import resource
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from flexlora.adapters.figure import MOST_KINDS, drawing_of, write_picture
from flexlora.adapters.inspection import Inspection, ModuleSpectrum
from flexlora.adapters.peft_format import PICTURE_ENDINGS


def module(path: str, *values: float) -> ModuleSpectrum:
    return ModuleSpectrum(path, (9, 9), max(1, len(values)), float(len(values)), values)


@pytest.fixture
def found() -> Inspection:
    """Two kinds in two layers, one of them in one only, and a module outside all layers with an awkward name."""
    modules = (
        module("model.layers.2.self_attn.q_proj", 3.0, 1.0),
        module("model.layers.2.mlp.up_proj", 2.0),
        module("model.layers.10.self_attn.q_proj", 2.0, 1e-9),
        module("lm_head<&>$x$"),
    )
    return Inspection("runs/me$a$", "us/llama", modules)


def texts(figure: Figure) -> list[str]:
    figure.draw_without_rendering()
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def test_a_drawing_says_what_each_kind_of_module_has(found: Inspection) -> None:
    shown = texts(drawing_of(found))
    assert "me$a$\nfor us/llama, 4 modules, norm of the change 4.243" in shown
    for label in ("self_attn.q_proj  (2)", "mlp.up_proj  (1)", "lm_head<&>$x$  (1)"):
        assert label in shown
    # 14 of 18 and 4 of 18; q_proj has effective ranks 2 and 2 in this fixture.
    assert {"77.8 %", "22.2 %", "0.0 %", "2.0 of 2", "1.0 of 1", "0.0 of 1"} <= set(shown)


def test_the_map_of_layers_holds_the_shares_and_leaves_out_what_is_not_there(found: Inspection) -> None:
    (axes,) = [axes for axes in drawing_of(found).axes if axes.images]
    shares = axes.images[0].get_array()
    assert shares is not None
    np.testing.assert_allclose(shares.filled(-1), [[9 / 18 + 1 / 18, 4 / 18], [4 / 18, -1]])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["2", "10"]


def test_without_layers_there_is_no_map_of_them() -> None:
    assert len(drawing_of(Inspection("adapter", None, (module("head", 2.0),))).axes) == 3


def test_an_adapter_that_changes_nothing_can_be_drawn(tmp_path: Path) -> None:
    nothing = Inspection("adapter", None, (module("h.0.attn"), module("h.1.attn")))
    write_picture(nothing, tmp_path / "nothing.png")


def test_of_many_kinds_those_with_the_most_energy_are_drawn() -> None:
    modules = tuple(module(f"h.0.kind_{number}", 1.0 + number) for number in range(MOST_KINDS + 4))
    shown = texts(drawing_of(Inspection("adapter", None, modules)))
    assert "kind_4  (1)" in shown and "kind_3  (1)" not in shown
    assert any("the 24 of 28 kinds of modules with the most energy" in text for text in shown)


@pytest.mark.parametrize("ending", PICTURE_ENDINGS)
def test_every_format_can_be_read_and_equal_adapters_give_equal_bytes(
    found: Inspection, tmp_path: Path, ending: str
) -> None:
    paths = [tmp_path / "new" / f"{name}{ending}" for name in ("one", "two")]
    for path in paths:
        write_picture(found, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(paths[0].parent.iterdir()) == paths
    if ending == ".png":
        height, width, _ = imread(paths[0]).shape
        assert width == 1760 and height > 600
    elif ending == ".svg":
        root = ElementTree.parse(paths[0]).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert not re.findall(r"<script|@import|href=\"http", paths[0].read_text())
        assert "lm_head<&>$x$  (1)" in [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    else:
        assert paths[0].read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("ending", PICTURE_ENDINGS)
def test_a_picture_that_cannot_be_finished_says_why_and_leaves_nothing(
    found: Inspection, tmp_path: Path, ending: str
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # As on a full disk, part of the file is written before an error comes.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_picture(found, tmp_path / "new" / f"picture{ending}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
