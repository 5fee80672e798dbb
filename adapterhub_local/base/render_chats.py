"""The process in which chat templates run: a template is a program, and may loop, fill the memory or crash.

Run as a program, not imported, so that it has nothing of ours and no torch. It renders with transformers' own function,
hence every text is what transformers would write. The process forks a worker that renders one conversation after the
other; a worker that takes too much is ended by the kernel, its parent says by which signal, and the next worker is
there at once. Messages: see `apart.py`; a question is `marshal` of arguments, an answer one byte (KINDS) and a text.
"""

import importlib
import importlib.util
import marshal
import os
import resource
import signal
import sys
from types import ModuleType
from typing import Any

SECONDS = 1.0  # of the processor, for one conversation, where nobody says otherwise
MEMORY = 256 << 20  # above what the process has anyhow
LONGEST = 32 << 20  # bytes of text
GROWN = 128 << 20  # bytes after which a worker makes room for a fresh one
TEXT, FAILED, TOO_LARGE, TOO_LONG, DIED = KINDS = b"tfmld"


def read_message() -> bytes | None:
    """The next message, None at the end. Without a buffer: the next worker continues where this one stopped."""
    head = _read(4)
    return _read(int.from_bytes(head, "big")) if len(head) == 4 else None


def _read(size: int) -> bytes:
    found = bytearray()
    while len(found) < size and (part := os.read(0, size - len(found))):
        found += part
    return bytes(found)


def write_message(sink: int, kind: int, text: bytes) -> None:
    """One answer."""
    rest = memoryview((len(text) + 1).to_bytes(4, "big") + bytes([kind]) + text)
    while rest:
        rest = rest[os.write(sink, rest) :]


def transformers_function() -> Any:
    """`render_jinja_template` of transformers.

    Its module needs two others; the packages around it load ten times as much, so empty ones stand in for them.
    """
    spec = importlib.util.find_spec("transformers")
    roots = list(spec.submodule_search_locations or ()) if spec else []
    names = ("transformers", "transformers.utils")
    try:
        for name, path in zip(names, (roots[0], os.path.join(roots[0], "utils")), strict=True):
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__path__ = [path]
        return importlib.import_module("transformers.utils.chat_template_utils").render_jinja_template
    except Exception:  # it needs more of them after all
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
            del sys.modules[name]
        return importlib.import_module("transformers.utils.chat_template_utils").render_jinja_template


class Worker:
    """Renders until there is nothing more to render, or until the process has grown."""

    def __init__(self, render: Any, sink: int, seconds: float) -> None:
        self._render, self._sink, self._seconds = render, sink, seconds
        self._size = os.open("/proc/self/statm", os.O_RDONLY)
        self._start = self._address_space()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = self._start + GROWN + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # there is nothing to be written but answers

    def run(self) -> int:
        """Exit code: 0 if the other side has hung up."""
        while (question := read_message()) is not None:
            write_message(self._sink, *self._answer(question))
            if self._address_space() > self._start + GROWN:
                return 1
        return 0

    def _answer(self, question: bytes) -> tuple[int, bytes]:
        """What a template writes, or why it does not. May end the process instead."""
        signal.setitimer(
            signal.ITIMER_PROF, self._seconds
        )  # SIGPROF ends the process, in the middle of whatever it does
        try:
            conversation, given = marshal.loads(question)  # noqa: S302 - our own process wrote it
            (text,), _ = self._render([conversation], **given)
            written = text.encode("utf-8", "surrogatepass")
            return (TEXT, written) if len(written) <= LONGEST else (TOO_LONG, b"")
        except MemoryError:
            return TOO_LARGE, b""
        except Exception as error:
            return FAILED, (str(error) or type(error).__name__)[:2000].encode("utf-8", "surrogatepass")
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    def _address_space(self) -> int:
        """Bytes that this process has mapped."""
        return int(os.pread(self._size, 100, 0).split()[0]) * resource.getpagesize()


def main() -> None:
    """Keep a worker until the other side hangs up."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.putenv(name, "1")  # numpy comes along, and is to start no thread
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sink, seconds = os.dup(1), float(sys.argv[1])
    render = transformers_function()
    render([[{"role": "user", "content": ""}]], chat_template="{{ messages }}")  # what is loaded late is loaded now
    write_message(sink, TEXT, b"")
    while True:
        worker = os.fork()
        if worker == 0:
            os._exit(Worker(render, sink, seconds).run())
        code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
        if code == 0:
            return
        if code < 0:
            write_message(sink, DIED, str(-code).encode())


if __name__ == "__main__":
    main()
