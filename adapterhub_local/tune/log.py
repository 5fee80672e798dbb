"""The scores of every candidate, a line each, in the folder of a search: what a stopped search goes on from."""

import json
from pathlib import Path

from adapterhub_local.tune.candidate import Candidate
from adapterhub_local.tune.race import Answers


def read(path: Path, counts: dict[str, int]) -> dict[str, Answers]:
    """Key -> answers; the last line of a key counts. A line that was cut off, or is of other data, is left out."""
    known = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
            losses = {task: tuple(entry["losses"][task]) for task in counts}
            hits = {task: tuple(entry["hits"][task]) for task in counts}
            if all(len(losses[task]) == len(hits[task]) == count for task, count in counts.items()):
                known[json.dumps(entry["candidate"], sort_keys=True)] = Answers(losses, hits)
        except (ValueError, KeyError, TypeError):
            continue
    return known


def append(path: Path, candidate: Candidate, answers: Answers) -> None:
    """Add a line. One that was cut off before is ended first, so that this one can be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {"candidate": candidate.to_json(), "losses": dict(answers.losses), "hits": dict(answers.hits)}
    with open(path, "a+b") as file:
        if file.seek(0, 2):
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(entry).encode() + b"\n")
