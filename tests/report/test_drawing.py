"""Parts of charts: words are escaped, axes have a label a mark."""

from flexlora.report.drawing import label, path_through, whole_drawing, x_axis, y_axis
from flexlora.report.scales import Scale


def test_words_in_a_drawing_are_escaped() -> None:
    drawing = whole_drawing([label(1, 2, "<b>&", "end")])
    assert ">&lt;b&gt;&amp;</text>" in drawing and drawing.startswith('<svg viewBox="0 0 520 270"')


def test_axes_have_a_label_for_each_mark() -> None:
    scale = Scale(0, 2, 0, 100)
    assert [part.split(">")[1].split("<")[0] for part in x_axis([0, 1, 2], scale)[1:]] == ["0", "1", "2"]
    lines = y_axis([0.0, 0.5], scale)
    assert ['y1="0.0"' in lines[0], 'y1="25.0"' in lines[2]] == [True, True]
    assert [line.split(">")[1].split("<")[0] for line in lines[1::2]] == ["0.0", "0.5"]


def test_a_path_moves_to_its_first_place_and_draws_to_the_others() -> None:
    assert path_through([(0, 1), (2.25, 3)]) == "M0.0 1.0L2.2 3.0"
    assert path_through([]) == ""
