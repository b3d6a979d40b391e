"""How pictures look and what is written of them."""

from itertools import combinations, pairwise

import matplotlib
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from benchmarks import figures


def drawn():
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(4, 3))
        axes = figure.subplots()
        for height, name in ((1.0, "first"), (1.01, "second"), (3.0, "third")):
            axes.plot([0, 1], [0, height], label=name)
    return figure, axes


def test_a_picture_is_a_png_of_200_dpi_and_an_svg_equal_each_time(tmp_path):
    png, svg = figures.save({"a": drawn()[0]}, tmp_path)
    assert Image.open(png).size == (800, 600)
    first = svg.read_bytes()
    figures.save({"a": drawn()[0]}, tmp_path)
    assert svg.read_bytes() == first and b"<svg" in first


def test_names_stand_at_the_ends_of_their_lines_and_apart():
    _, axes = drawn()
    figures.name_lines(axes)
    names = {text.get_text(): text for text in axes.texts}
    assert names["first"].xy == (1, 1.0) and names["third"].xy == (1, 3.0)
    assert names["first"].get_color() == axes.lines[0].get_color()
    height = 11 * 3 / axes.get_window_extent().height  # of a line of text, in units of the axis
    ends = sorted(text.xy[1] for text in axes.texts)
    assert all(upper - lower > height for lower, upper in pairwise(ends))


def test_no_two_colours_look_alike_to_the_colour_blind():
    """Viénot, Brettel and Mollon (1999): red-blind and green-blind sight as matrices on linear RGB."""
    for matrix in (
        ((0.11238, 0.88762, 0.0), (0.11238, 0.88762, 0.0), (0.00401, -0.00401, 1.0)),
        ((0.29275, 0.70725, 0.0), (0.29275, 0.70725, 0.0), (-0.02234, 0.02234, 1.0)),
    ):
        seen = []
        for colour in figures.COLOURS:
            linear = [value**2.2 for value in to_rgb(colour)]
            seen.append([max(0.0, sum(w * v for w, v in zip(row, linear, strict=True))) ** (1 / 2.2) for row in matrix])
        for one, other in combinations(seen, 2):
            assert sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5 > 0.1


@pytest.mark.parametrize("name", ["waveclip-fig4", "patchrank-fig5"])
def test_stored_results_can_be_drawn_again(name, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "BENCHMARKS", [entry for entry in figures.BENCHMARKS if entry.name == name])
    written = []
    monkeypatch.setattr(figures, "save", lambda pictures: written.extend(pictures) or [])
    assert figures.main() == 0 and written == [name]
