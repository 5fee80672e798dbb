"""The log of a run from a byte on, so that who follows it reads each line once."""

import json
import os
from pathlib import Path
from typing import Any

from adapterhub_local.train.past_runs import LOG


def log_from(folder: Path, offset: int, limit: int) -> tuple[list[dict[str, Any]], int]:
    """The whole lines from byte `offset` on, `limit` bytes of them at most, and where the next begins.

    A log that is shorter than `offset` was begun again: it is read from its start.
    """
    try:
        with open(folder / LOG, "rb") as log:
            if os.fstat(log.fileno()).st_size < offset:
                offset = 0
            log.seek(offset)
            data = log.read(limit)
    except FileNotFoundError:
        return [], 0
    whole = data[: data.rfind(b"\n") + 1]
    entries = []
    for line in whole.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "step" in entry:
            entries.append(entry)
    return entries, offset + len(whole)
