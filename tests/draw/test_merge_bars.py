"""The picture of a merge's loss."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from adapterhub_local.draw.merge_bars import draw, write_plot
from adapterhub_local.errors import InUse
from adapterhub_local.merge.merge import dry_run
from adapterhub_local.merge.plan import make_plan
from adapterhub_local.registry import Registry
from tests.merges import MODULES, save_adapter

SVG = "{http://www.w3.org/2000/svg}"


def test_a_picture_has_a_bar_for_each_module(tmp_path: Path) -> None:
    """Two bars a module, named, inside the picture; well-formed XML whatever modules are called; never overwritten."""
    plan = make_plan([str(save_adapter(tmp_path / "a", 1))], [1.0], Registry())
    report = dry_run(plan).to_json()
    report["modules"][0]["module"] = "<&>"
    write_plot(report, tmp_path / "plot.svg")
    tree = ElementTree.fromstring((tmp_path / "plot.svg").read_text())
    titles = [title.text or "" for title in tree.iter(f"{SVG}title")]
    assert len(titles) == 2 * len(MODULES)
    assert sum("<&>" in title for title in titles) == 2
    assert all(float(bar.get("height", 0)) >= 0 for bar in tree.iter(f"{SVG}rect"))
    with pytest.raises(InUse):
        write_plot(report, tmp_path / "plot.svg")


def test_a_merge_without_loss_is_drawn_too(tmp_path: Path) -> None:
    """Errors of zero divide by nothing."""
    report = dry_run(make_plan([str(save_adapter(tmp_path / "a", 1))], [1.0], Registry())).to_json()
    for module in report["modules"]:
        module["relative_error"] = 0.0
    assert ElementTree.fromstring(draw(report)).tag == f"{SVG}svg"
