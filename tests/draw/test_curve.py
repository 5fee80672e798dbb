"""Curves as pictures: SVG and PNG show the same, whatever the points are."""

from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from adapterhub_local.draw.curve import GRID, TRAIN, WIDTH, Panel, loss_panel, svg, write_picture
from adapterhub_local.errors import InputError, InUse

FALLING = [(float(step), 2.0 / step) for step in range(1, 40)]
SVG = "{http://www.w3.org/2000/svg}"


def test_svg_and_png_show_the_same(tmp_path: Path) -> None:
    """The mean of the training loss is where the SVG says it is in the PNG too, and falls from left to right."""
    panels = [loss_panel(FALLING, [(39.0, 1.0)]), Panel("nothing", ())]
    for name in ("curve.svg", "curve.png"):
        write_picture(panels, "<a & b>@1", tmp_path / name)
    tree = ElementTree.fromstring((tmp_path / "curve.svg").read_text())
    mean = next(line for line in tree.iter(f"{SVG}polyline") if line.get("stroke") == TRAIN)
    pixels = [tuple(map(float, point.split(","))) for point in mean.attrib["points"].split()]
    with Image.open(tmp_path / "curve.png") as image:
        scale = image.width // WIDTH
        seen = [image.getpixel((round(x * scale), round(y * scale))) for x, y in pixels[1:-1]]

    assert len(pixels) == 39
    assert pixels == sorted(pixels)
    assert [y for _, y in pixels] == sorted(y for _, y in pixels)  # downwards is more
    assert all(colour[0] < 120 for colour in seen)  # no white and no faint line
    assert next(text.text for text in tree.iter(f"{SVG}text")) == "<a & b>@1"


def test_any_points(tmp_path: Path) -> None:
    """No point, one, several at one step, and values that are no numbers make a picture all the same."""
    for points in ([], [(1.0, 2.0)], [(1.0, 2.0), (1.0, 3.0)], [(1.0, float("nan")), (2.0, float("inf")), (3.0, 0.0)]):
        drawn = svg([loss_panel(points)], "x")
        assert ElementTree.fromstring(drawn).tag == f"{SVG}svg"
        assert "nan" not in drawn
        assert (GRID in drawn) == bool(points)
        write_picture([loss_panel(points)], "x", tmp_path / f"{len(points)}{len(drawn)}.png")


def test_where_a_picture_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another ending, a file or folder in the way, and a PNG without Pillow are reported, and nothing is written."""
    (tmp_path / "there.svg").write_text("")
    with pytest.raises(InputError, match=r"must end in \.svg or \.png"):
        write_picture([], "x", tmp_path / "curve.gif")
    with pytest.raises(InUse, match="exists already"):
        write_picture([], "x", tmp_path / "there.svg")
    with pytest.raises(InputError, match="create the folder first"):
        write_picture([], "x", tmp_path / "none" / "x.svg")
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(InputError, match="PNG needs the package Pillow: pip install pillow"):
        write_picture([], "x", tmp_path / "x.png")
    assert [path.name for path in tmp_path.iterdir()] == ["there.svg"]
