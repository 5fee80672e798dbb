"""Cosines by module and layer as squares: each module its own, or groups of layers where there are too many."""

from xml.etree import ElementTree

import pytest

from adapterhub_local.draw.heat_map import colour, heat_map, merged_squares, squares


def rects(text: str) -> list[ElementTree.Element]:
    """The squares that have a title: not the legend's."""
    return [rect for rect in ElementTree.fromstring(text).iter("rect") if len(rect)]


def test_each_module_has_a_square() -> None:
    """Its colour and its title are those of its cosine; one that has none is empty."""
    values = {"model.layers.0.mlp.up_proj": 0.5, "model.layers.1.mlp.up_proj": -1.0, "lm_head": None}
    found = rects(heat_map(squares(values), "<of two>"))
    assert [rect.get("fill") for rect in found] == [colour(0.5), colour(-1.0), "none"]
    assert [rect[0].text for rect in found] == [
        "model.layers.0.mlp.up_proj: +0.500", "model.layers.1.mlp.up_proj: -1.000", "lm_head: none",
    ]  # fmt: skip


@pytest.mark.parametrize(("most", "columns"), [(240, 34), (48, 6), (7, 1)])
def test_layers_are_put_together(most: int, columns: int) -> None:
    """No more squares than may be; a square's value is the mean of its modules, and its title says the spread."""
    values = {f"model.layers.{layer}.mlp.k{kind}": layer / 142 for layer in range(143) for kind in range(7)}
    made, told = merged_squares(values, most)
    size = -(-143 // columns)
    assert len(made) == 7 * -(-143 // size) <= most
    assert told == f"Each square is the mean of up to {size} layers."
    first = made[0]
    assert first.value == pytest.approx((size - 1) / 284)
    assert first.title == f"mlp.k0, layers 0 to {size - 1}: {first.value:+.3f}, +0.000 to {(size - 1) / 142:+.3f}"
    assert len(rects(heat_map(made, "x"))) == len(made)


def test_experts_are_of_one_kind() -> None:
    """Modules that differ in the number of an expert share a square; where kinds are too many the lowest are shown."""
    values: dict[str, float | None] = {
        f"model.layers.{layer}.mlp.experts.{expert}.up_proj": expert / 100 for layer in range(3) for expert in range(64)
    }
    made, told = merged_squares(values, 100)
    assert made[0].title == "mlp.experts.*.up_proj, layer 0: +0.315, +0.000 to +0.630"
    assert (len(made), told) == (3, "Each square is the mean of a layer.")
    made, told = merged_squares({f"part{index}": index / 500 for index in range(500)} | {"none": None}, 20)
    assert [square.kind for square in made] == [f"part{index}" for index in range(20)]
    assert "of 501 kinds of modules the 20 with the lowest cosines are shown" in told
