"""A training curve as SVG, drawn from its points alone; every value is a number, so nothing can be smuggled in."""

from collections.abc import Sequence

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 720, 300, 56, 40, 36  # pixels
LINE, FAINT, INK, GRID = "#2f6f8f", "#b9d3df", "#333333", "#dddddd"
SMOOTH = 0.8  # share of the running mean that is kept at each step


def draw_curve(points: Sequence[tuple[float, float]], title: str) -> str | None:
    """The SVG of loss over optimizer steps with its running mean; None for fewer than two points."""
    if len(points) < 2:
        return None
    steps, losses = [point[0] for point in points], [point[1] for point in points]
    first, last, highest = steps[0], max(steps[-1], steps[0] + 1), max(*losses, 1e-9)

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - 16)

    def y(loss: float) -> float:
        return TOP + (1 - max(0.0, loss) / highest) * (HEIGHT - TOP - BOTTOM)

    smooth, mean = [], losses[0]
    for loss in losses:
        mean = SMOOTH * mean + (1 - SMOOTH) * loss
        smooth.append(mean)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-size="12">',
        "<style>text { font-family: sans-serif }</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="14" fill="{INK}">{title}: training loss, nats per answer token</text>',
    ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        at = y(share * highest)
        parts.append(f'<path d="M{LEFT} {at:.1f}H{WIDTH - 16}" stroke="{GRID}"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end" fill="{INK}">{share * highest:.2f}</text>'
        )
    for step, anchor in ((first, "start"), (last, "end")):
        parts.append(
            f'<text x="{x(step):.1f}" y="{HEIGHT - 14}" text-anchor="{anchor}" fill="{INK}">step {step:g}</text>'
        )
    for values, colour, width in ((losses, FAINT, 1), (smooth, LINE, 2)):
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in zip(steps, values, strict=True))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"
