"""Build the sdist and the wheel so that the same sources give the same bytes, whoever builds them, where and when.

    python release/dist.py dist      # `make dist`; --check builds twice and compares, --no-isolation fetches nothing

The sources are the files that git knows. Times are SOURCE_DATE_EPOCH, else the time of the last commit; owners, modes
and the order of files are fixed. The wheel is built from the sdist.
"""

import argparse
import gzip
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EARLIEST = 315532800  # 1980, the first year of a zip


def main() -> None:
    """Build, and print the digest of each file."""
    parser = argparse.ArgumentParser(description="Build sdist and wheel, byte for byte reproducible.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--check", action="store_true", help="build twice and compare")
    parser.add_argument("--no-isolation", action="store_true", help="use the setuptools that is installed")
    arguments = parser.parse_args()
    built = build(arguments.out, arguments.no_isolation)
    if arguments.check:
        with tempfile.TemporaryDirectory() as folder:
            for path in build(Path(folder), arguments.no_isolation):
                if path.read_bytes() != (arguments.out / path.name).read_bytes():
                    sys.exit(f"{path.name} differs between two builds")
    for path in built:
        print(hashlib.sha256(path.read_bytes()).hexdigest(), path.name)


def build(out: Path, no_isolation: bool) -> list[Path]:
    """The sdist and the wheel, in `out`."""
    when = epoch()
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(when), "PYTHONHASHSEED": "0", "TZ": "UTC"}
    options = ["--no-isolation"] if no_isolation else []
    with tempfile.TemporaryDirectory() as folder:
        tree, made = Path(folder, "tree"), Path(folder, "made")
        copy_sources(tree, when)
        command = [sys.executable, "-m", "build", *options, "--outdir", str(made)]
        _run([*command, "--sdist", str(tree)], environment)
        (sdist,) = made.glob("*.tar.gz")
        repack(sdist, when)
        with tarfile.open(sdist) as archive:
            archive.extractall(Path(folder, "unpacked"), filter="data")
        (unpacked,) = Path(folder, "unpacked").iterdir()
        _run([*command, "--wheel", str(unpacked)], environment)
        out.mkdir(parents=True, exist_ok=True)
        return [Path(shutil.copy(path, out)) for path in sorted(made.iterdir())]


def epoch() -> int:
    """The time that every file gets: SOURCE_DATE_EPOCH, else that of the last commit."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given is None:
        done = subprocess.run(
            ["git", "-C", ROOT, "log", "-1", "--format=%ct"], capture_output=True, text=True, check=False
        )
        given = done.stdout.strip() or str(EARLIEST)
    return max(EARLIEST, int(given))


def copy_sources(tree: Path, when: int) -> None:
    """The files that git knows, as they are now, with the same modes and times everywhere."""
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=True).stdout
    for name in sorted(filter(None, listed.split("\0"))):
        source, target = ROOT / name, tree / name
        if not source.is_file():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        target.chmod(0o755 if source.stat().st_mode & 0o100 else 0o644)
        os.utime(target, (when, when))


def repack(sdist: Path, when: int) -> None:
    """Write the archive again: sorted, of nobody, at one time, without the time in gzip's header."""
    plain = io.BytesIO()
    with tarfile.open(sdist) as old, tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as new:
        for member in sorted(old.getmembers(), key=lambda one: one.name):
            kept = tarfile.TarInfo(member.name)
            kept.size, kept.type, kept.mtime = member.size, member.type, when
            kept.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            new.addfile(kept, old.extractfile(member) if member.isfile() else None)
    with open(sdist, "wb") as file, gzip.GzipFile("", "wb", compresslevel=9, fileobj=file, mtime=when) as packed:
        packed.write(plain.getvalue())


def _run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, umask=0o022)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


if __name__ == "__main__":
    main()
