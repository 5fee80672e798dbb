"""What an installation is made of: versions that were tested together, each file by its hash, and what builds it."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = (ROOT / "requirements.lock").read_text()


def canonical(name: str) -> str:
    """A package's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text: str) -> dict[str, str]:
    """Name -> version of every `name==version` that a line begins with."""
    return {
        canonical(name): version for name, version in re.findall(r"^([\w.-]+)(?:\[[\w,-]+\])?==([^\s;\\]+)", text, re.M)
    }


def test_the_lock_has_the_versions_that_were_tested() -> None:
    """Every pin with hashes is the pin without; `make lock` makes them agree again."""
    tested = pins((ROOT / "constraints.txt").read_text())
    locked = pins(LOCK)
    assert {name: version for name, version in locked.items() if tested.get(name, version) != version} == {}
    assert len(locked.keys() & tested.keys()) > 60


def test_every_file_has_its_hash() -> None:
    """No line of the lock leaves a package without a sha256, and none names where it comes from."""
    entries = re.split(r"\n(?=[\w])", "\n".join(line for line in LOCK.splitlines() if not line.startswith("#")).strip())
    assert len(entries) == len(pins(LOCK))
    for entry in entries:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry[:60]
    assert "://" not in LOCK


def test_what_we_need_is_in_the_lock() -> None:
    """Direct dependencies and those of a server's extras are locked; what builds the wheel is pinned."""
    names_said = re.search(r"adapterhub-local\[([\w,-]+)\]", LOCK)[1].split(",")
    assert names_said == re.findall(r"--extra (\w+)", (ROOT / "Makefile").read_text()), "the comment is `make lock`'s"
    extras = PROJECT["project"]["optional-dependencies"]
    needed = [
        *PROJECT["project"]["dependencies"],
        *(item for name in ("sign", "parquet", "plot", "s3", "redis", "tune", "otel") for item in extras[name]),
    ]
    names = {canonical(re.match(r"[\w.-]+", item)[0]) for item in needed}
    assert names - pins(LOCK).keys() == set()
    assert all("==" in item for item in PROJECT["build-system"]["requires"])
