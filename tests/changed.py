"""Which tests belong to what changed: `python -m tests.changed main` prints files and folders for pytest.

A file of a room stands for the room's tests, a test for itself; what lies above the rooms stands for nothing more than
the layout and docs tests, which always run.
"""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]


def changed(since: str) -> list[str]:
    """Paths that differ from where this branch left `since`, new files included."""

    def git(*arguments: str) -> list[str]:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.split()

    base = git("merge-base", since, "HEAD")[0]
    return [*git("diff", "--name-only", base), *git("ls-files", "--others", "--exclude-standard")]


def related_tests(paths: Iterable[str]) -> list[str]:
    """The test files and folders for these paths, each once, none inside another."""
    found: dict[str, None] = {}
    for path in paths:
        parts = Path(path).parts
        candidates = []
        if parts[0] == "tests" and parts[-1].startswith("test_"):
            candidates = [path]
        elif parts[0] == "adapterhub_local" and len(parts) > 1:
            room = parts[1].removesuffix(".py")
            candidates = [f"tests/{room}", f"tests/test_{room}.py"]
        elif parts[0] == "serve" and len(parts) > 1:
            room = parts[1].removesuffix(".py")
            candidates = [f"tests/serve/{room}"] if len(parts) > 2 else ["tests/serve/http"]
        found |= {each: None for each in candidates if (ROOT / each).exists()}
    return [each for each in found if not any(each.startswith(f"{other}/") for other in found)]


if __name__ == "__main__":
    sys.stdout.write(" ".join(related_tests(changed(sys.argv[1]))) + "\n")
