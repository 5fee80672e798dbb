"""The training curve of a run, short enough to be kept in a version's lineage."""

import json
import math
from pathlib import Path

MAX_POINTS = 200


def read_curve(log: Path) -> list[list[float]]:
    """[step, loss] from a run's `log.jsonl`, at most MAX_POINTS of them, each the mean of the steps it stands for.

    A run that was resumed wrote some steps again: the later line counts. Unreadable lines are passed over.
    """
    losses: dict[int, float] = {}
    if not log.is_file():
        return []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
            if math.isfinite(entry["loss"]):
                losses[int(entry["step"])] = float(entry["loss"])
        except (ValueError, KeyError, TypeError):  # the last line of a run that was killed
            continue
    steps = sorted(losses)
    width = -(-len(steps) // MAX_POINTS) or 1
    groups = [steps[start : start + width] for start in range(0, len(steps), width)]
    return [[group[-1], round(sum(losses[step] for step in group) / len(group), 5)] for group in groups]
