"""The C kernels as a library, compiled once for this processor by the C compiler that is here, if there is one.

OpenMP is torch's own, whose helper threads the kernels share: a second one would fight with it for the cores. So the
library is linked to none, and finds the functions of the one that torch has loaded.
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from adapterhub_local import settings

FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "cpu.c", FOLDER / "step.c", FOLDER / "attention.c")
# sums stay in the order written: neighbours change no bit of a token; NaN stays NaN: the engine must see it
FLAGS = ["-O3", "-march=native", "-std=gnu11", "-fPIC", "-fopenmp", "-ffp-contract=fast"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"]
SECONDS = 120
DIGEST_BYTES = 32
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
logger = logging.getLogger(__name__)


class CannotCompile(Exception):
    """There is no library, and why."""


def load_library() -> ctypes.CDLL:
    """The kernels' library, compiled if it is not yet. Raises CannotCompile."""
    if platform.system() != "Linux":
        raise CannotCompile("they are compiled on Linux only")
    compiler = find_compiler()
    path = _folder() / f"kernels-{_key(compiler)}.so"
    try:
        if not _is_ours(path):
            _compile(compiler, path)
        try:
            return _loaded(path)
        except OSError as error:
            logger.warning("%s is damaged (%s): it is compiled anew", path, error)
            _compile(compiler, path)
            return _loaded(path)
    except OSError as error:  # a folder that cannot be written, a library that does not load
        raise CannotCompile(f"{path.parent}: {error}") from None


def built_library(compiler: list[str]) -> Path | None:
    """Where the library that this compiler made of these sources for this processor is; None if it is not made yet."""
    path = settings.cache() / f"kernels-{_key(compiler)}.so"
    return path if path.is_file() else None


def find_compiler() -> list[str]:
    """The command of a C compiler: what CC says, or one found. Raises CannotCompile."""
    for words in (settings.compiler(), ["cc"], ["gcc"], ["clang"]):
        if words and (found := shutil.which(words[0])):
            return [found, *words[1:]]
    raise CannotCompile("there is no C compiler (cc, gcc or clang; in Debian: apt install gcc)")


def _folder() -> Path:
    """For all of a user's homes, as torch and Triton keep what they compile."""
    folder = settings.cache()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise CannotCompile(f"{folder}: {error.strerror}") from None
    state = folder.lstat()
    if stat.S_ISLNK(state.st_mode) or state.st_uid != os.geteuid():
        raise CannotCompile(
            f"{folder} is a link or belongs to another user, and what lies there would be run: remove it"
        )
    if state.st_mode & OTHERS_WRITE:
        folder.chmod(stat.S_IMODE(state.st_mode) & ~OTHERS_WRITE)
    return folder


def _is_ours(path: Path) -> bool:
    """Whether the library is there, made by this user, and nobody else can have changed it."""
    try:
        state = path.lstat()
    except FileNotFoundError:
        return False
    is_ours = stat.S_ISREG(state.st_mode) and state.st_uid == os.geteuid() and not state.st_mode & OTHERS_WRITE
    if not is_ours:
        logger.warning("%s is a link, or others may have written it: it is compiled anew", path)
    return is_ours


def _loaded(path: Path) -> ctypes.CDLL:
    """The library. Raises OSError if it is not what was compiled."""
    content = path.read_bytes()
    if content[-DIGEST_BYTES:] != hashlib.sha256(content[:-DIGEST_BYTES]).digest():
        raise OSError("its content is not what was compiled")
    return ctypes.CDLL(str(path))


def _key(compiler: list[str]) -> str:
    """What the library depends on: a home folder may be shared by machines with other processors."""
    features = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    sources = sorted([*FOLDER.glob("*.c"), *FOLDER.glob("*.h")])
    parts = [*(path.read_text() for path in sources), *FLAGS, *compiler, platform.machine(), features]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: list[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made, linked = [str(Path(folder) / f"{source.stem}.o") for source in SOURCES], Path(folder) / "kernels.so"
        compile_each = [[*FLAGS, "-c", str(source), "-o", path] for source, path in zip(SOURCES, made, strict=True)]
        with ThreadPoolExecutor(len(compile_each)) as pool:  # side by side, for a core each
            for _ in pool.map(lambda arguments: _run([*compiler, *arguments]), compile_each):
                pass
        _run([*compiler, "-shared", *made, "-o", str(linked)])
        with linked.open("r+b") as file:  # its digest behind it, which loaders do not read
            digest = hashlib.sha256(file.read()).digest()
            file.write(digest)
        linked.chmod(0o755)
        linked.replace(path)  # another process may do the same at this moment


def _run(command: list[str]) -> None:
    """Run a compiler. Raises CannotCompile."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise CannotCompile(f"{command[0]} took more than {SECONDS} s") from None
    if done.returncode:
        line = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
        raise CannotCompile(f"{command[0]}: {line.strip() or f'it ended with {done.returncode}'}")
