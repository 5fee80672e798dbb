"""The check of a GPU ends in its time and says what it left out, on a machine without one, too."""

import time
from pathlib import Path

import pytest
import torch

from tests.gpu import check
from tests.gpu.check import NO_GPU, PARTS, Part, main, run, why_no_triton
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every part is skipped with the reason, and nothing failed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 0
    said = capsys.readouterr().out
    assert "torch " in said.splitlines()[0]
    assert [line for part in PARTS for line in said.splitlines() if line.startswith(part.name) and NO_GPU in line]


def test_the_parts_fit_their_time() -> None:
    """Together they end within nine minutes, and name files that are there."""
    assert sum(part.seconds for part in PARTS) + 2 * check.GRACE <= 9 * 60
    for part in PARTS:
        assert all((ROOT / each).is_file() for each in part.arguments if not each.startswith("-"))


@pytest.mark.parametrize(
    ("body", "result", "counts"),
    [
        ("assert True", "passed", "1 passed"),
        ("assert 1 == 2", "failed (1)", "1 failed"),
        ("import time; time.sleep(600)", "took longer than 3 s", ""),
        ("import pytest; pytest.skip('there is none')", "passed", "1 skipped"),
    ],
    ids=["passes", "fails", "hangs", "skips"],
)
def test_a_part(
    body: str,
    result: str,
    counts: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It passes, fails, is skipped or is ended in its time; what pytest printed is there to read."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # which take seconds to import
    (tmp_path / "test_one.py").write_text(f"def test_one():\n    {body}\n")
    begun = time.monotonic()
    seconds = 3 if "sleep" in body else int(PATIENCE)
    got = run(Part("one", ("--noconftest", "-c", "/dev/null", str(tmp_path / "test_one.py")), seconds), seconds)
    assert time.monotonic() - begun < PATIENCE
    assert got[0] == result
    assert counts in got[1]
    if body.startswith("assert 1"):
        assert "1 == 2" in capfd.readouterr().out


def test_what_triton_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler or Python's headers the reason names what is missing."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(check.shutil, "which", lambda _: None)
    assert "neither gcc nor clang" in (why_no_triton() or "")
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(check.sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    assert "python3-dev" in (why_no_triton() or "")
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda _: None)
    assert why_no_triton() == "Triton is not installed"
