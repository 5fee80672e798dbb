"""A few seconds of the churn that benchmarks/serve_churn.py keeps up for an hour, and the line it fits.

    python -m tests.serve.adapters.test_churn 600

keeps it up for ten minutes in a server of its own, and fails if what was loaded stays or a request got no answer.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.registry import Registry
from benchmarks.serve_churn import RANKS, Churn, measure, slope
from serve.engine.options import EngineOptions
from tests.serve.adapter_makers import publish
from tests.serve.conftest import Server


def test_adapters_come_and_go(built_base: Path, tmp_path: Path) -> None:
    """More adapters than fit, republished, moved and removed all the time: every request is answered, none is held."""
    registry = Registry(tmp_path / "home")
    base = read_record(built_base)
    names = [f"adapter-{number}" for number in range(12)]
    for number, name in enumerate(names):
        last = publish(registry, name, base, seed=number, rank=RANKS[number % len(RANKS)], alias="prod")
    largest = sum(file.size for file in last.files)
    options = EngineOptions(max_rows=4, max_adapters=2, max_length=256, adapter_bytes=6 * largest)
    server = Server(load_base(base, device="cpu"), registry, options=options)
    churn = Churn(server.url, registry, base, names, rate=20.0, seed=1)
    seen: list[int] = []
    try:
        asyncio.run(churn.run(4.0, 0.2, lambda: seen.append(server.service.engine.pool.num_bytes)))
        numbers = server.wait_until_idle()
        pool = server.service.engine.pool
        seen.append(pool.num_bytes)  # on a busy machine perhaps the only look
        assert churn.problems == []
        assert churn.counts["200"] > 5
        assert churn.counts["published"] > 2
        assert numbers["adapter_evictions"] > 2
        assert 0 < max(seen) <= pool.max_bytes
        assert not any(pool.users().values())
        assert not any(record.num_loading for record in pool.records.all())
        assert len(server.service.engine.slots) <= 2
    finally:
        server.stop()


def test_the_fitted_line() -> None:
    """Growth an hour of a straight line is its slope, without error; noise without growth is within its error."""
    growth, error = slope([(at, 100 + at / 60) for at in range(0, 600, 5)])
    assert growth == pytest.approx(60)
    assert error == pytest.approx(0, abs=1e-6)
    growth, error = slope([(at, 100 + (-1) ** at) for at in range(0, 600, 3)])
    assert abs(growth) < 3 * error


def check_churn(seen: dict[str, Any]) -> None:
    """Every request answered, and of all that was loaded in the second half less than a tenth left in memory.

    In ten minutes memory is not flat yet (benchmarks/RESULTS.md): oneDNN still meets new numbers of tokens.
    """
    assert seen["failed_requests"] == 0, seen["problems"]
    assert seen["adapter_evictions"] > 2
    grown = seen["memory_mb"]["last"] - seen["memory_mb"]["at_half"]
    assert grown < 0.1 * seen["loaded_mb_in_total"] / 2, f"{grown:.0f} MB more than at half time"
    for kind, most in (("open_files", 32), ("threads", 16)):  # so many more than before the first request
        assert seen[kind]["last"] <= seen[kind]["first"] + most, seen[kind]


if __name__ == "__main__":
    os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    options = argparse.Namespace(
        seconds=float(sys.argv[1]), rate=20.0, publish_every=1.0, adapters=200, base=None, seed=1
    )
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder))
    sys.stdout.write(json.dumps(result) + "\n")
    check_churn(result)
