"""A share with its interval as a bar, and a tick where the base is: inline SVG that takes its colours from the page."""

from collections.abc import Sequence
from html import escape

from adapterhub_local.visible import visible_line

WIDTH, HEIGHT = 160, 18


def interval_bar(value: float, interval: Sequence[float] | None, base: float | None, description: str) -> str:
    """A bar from 0 to `value` (0 to 1), the band of its interval, the base's tick; screen readers get `description`."""

    def at(share: float) -> float:
        return 1 + max(0.0, min(1.0, share)) * (WIDTH - 2)

    shown = escape(visible_line(description), quote=True)  # once: a list has a hundred bars
    parts = [
        (
            f'<svg class="bar" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img">'
            f"<title>{shown}</title>"
        ),
        f'<rect class="track" x="0" y="5" width="{WIDTH}" height="8" rx="2"/>',
        f'<rect class="value" x="0" y="5" width="{at(value):.1f}" height="8" rx="2"/>',
    ]
    if interval is not None:
        low, high = at(interval[0]), at(interval[1])
        parts.append(f'<rect class="band" x="{low:.1f}" y="2" width="{max(1.0, high - low):.1f}" height="14" rx="2"/>')
    if base is not None:
        parts.append(f'<path class="tick" d="M{at(base):.1f} 0V{HEIGHT}"/>')
    return "".join([*parts, "</svg>"])
