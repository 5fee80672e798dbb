"""A picture of a merge's loss as SVG, drawn from its report alone: one bar for each module, layer by layer."""

from html import escape
from pathlib import Path
from typing import Any

from adapterhub_local.durable import check_absent, place_file, staging
from adapterhub_local.errors import InputError
from adapterhub_local.visible import visible_line

WIDTH, BAND, LEFT, TOP = 960, 200, 60, 56  # pixels
ERROR, ENERGY, INK = "#b4472f", "#2f6f8f", "#333333"


def check_plot(target: Path) -> None:
    """Raises InputError if `target` is not named as SVG, InUse if it exists."""
    if target.suffix != ".svg":
        raise InputError(f"{target} must end in .svg: that is what --plot draws")
    check_absent(target)


def write_plot(report: dict[str, Any], target: Path) -> None:
    """Write the picture of a report's `to_json` to `target`. Raises InUse if it exists."""
    check_absent(target)
    with staging(target.absolute().parent, prefix=".qhub-") as stage:
        (stage / "plot.svg").write_text(draw(report), encoding="utf-8")
        place_file(stage / "plot.svg", target)


def draw(report: dict[str, Any]) -> str:
    """The SVG: above, the relative error of each module; below, the share of energy retained."""
    modules = report["modules"]
    largest = max((module["relative_error"] for module in modules), default=0.0) or 1.0
    method = report["method"].replace("_", " ")
    title = f"{method}, rank {report['rank']}, {report['dtype']}: relative error {report['relative_error']:.2e}"
    height = TOP + 2 * BAND + 90
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/><style>text {{ font-family: sans-serif }}</style>',
        f'<text x="{LEFT}" y="24" font-size="15" fill="{INK}">{escape(visible_line(title))}</text>',
    ]
    bands = (
        ("relative error", [module["relative_error"] / largest for module in modules], f"{largest:.1e}", ERROR),
        ("energy retained", [module["retained_energy"] for module in modules], "100%", ENERGY),
    )
    for number, (label, shares, highest, colour) in enumerate(bands):
        top = TOP + number * (BAND + 40)
        parts.append(f'<text x="{LEFT}" y="{top - 6}" fill="{INK}">{label}, of {len(modules)} modules</text>')
        parts.append(f'<text x="{LEFT - 6}" y="{top + 10}" text-anchor="end" fill="{INK}">{highest}</text>')
        parts.append(f'<text x="{LEFT - 6}" y="{top + BAND}" text-anchor="end" fill="{INK}">0</text>')
        parts.append(f'<path d="M{LEFT} {top}V{top + BAND}H{WIDTH - 10}" fill="none" stroke="{INK}"/>')
        step = (WIDTH - 10 - LEFT) / max(1, len(modules))
        for index, (module, share) in enumerate(zip(modules, shares, strict=True)):
            size = max(0.0, min(1.0, share)) * BAND
            tooltip = (
                f"{module['module']}: error {module['relative_error']:.2e}, energy {module['retained_energy']:.4%}"
            )
            parts.append(
                f'<rect x="{LEFT + index * step:.2f}" y="{top + BAND - size:.2f}" width="{step * 0.85:.2f}" '
                f'height="{size:.2f}" fill="{colour}"><title>{escape(visible_line(tooltip))}</title></rect>'
            )
    return "\n".join([*parts, "</svg>"]) + "\n"
