"""FormCompiler: forms are tried in another process first, so that none can end or fill up this one."""

import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from llguidance import LLMatcher, LLTokenizer

from serve.errors import Busy
from serve.text import compile_forms
from serve.text.compile_forms import MEMORY, SECONDS, STACK

Result = TypeVar("Result")
PROCESSES = 2  # forms that are tried at the same time
WAIT = 20.0  # seconds of the clock, on a machine that has others to serve
REMEMBERED = 1024  # forms of which it is known whether they can be used
_STACKS = threading.Lock()


class FormCompiler:
    """Makes matchers over one tokenizer. Its processes are started when they are needed."""

    def __init__(self, tokenizer: str, size: int, end_tokens: list[int]) -> None:
        self.tokenizer = LLTokenizer(tokenizer, n_vocab=size, eos_token=end_tokens)
        self._setup = {"tokenizer": tokenizer, "size": size, "end_tokens": end_tokens}
        self._free: queue.LifoQueue[_Process | None] = queue.LifoQueue()
        for _ in range(PROCESSES):
            self._free.put(None)
        self._problems: OrderedDict[bytes, str | None] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, grammar: str) -> LLMatcher:
        """A matcher that has seen no token yet. Raises ValueError with what is wrong with the grammar, and Busy."""
        digest = sha256(grammar.encode()).digest()
        with self._lock:
            is_known, problem = digest in self._problems, self._problems.get(digest)
        if not is_known:
            problem = self._tried(grammar)
            with self._lock:
                self._problems[digest] = problem
                if len(self._problems) > REMEMBERED:
                    self._problems.popitem(last=False)
        if problem is not None:
            raise ValueError(problem)
        # twice what the other process had
        matcher = with_stack(2 * STACK, lambda: self._made(grammar))
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher

    def close(self) -> None:
        """End the processes."""
        for _ in range(PROCESSES):
            try:
                process = self._free.get_nowait()
            except queue.Empty:
                return
            if process is not None:
                process.close()
            self._free.put(None)

    def _made(self, grammar: str) -> LLMatcher:
        return LLMatcher(self.tokenizer, grammar, log_level=0, limits=compile_forms.limits())

    def _tried(self, grammar: str) -> str | None:
        try:
            process = self._free.get(timeout=WAIT)
        except queue.Empty:
            raise Busy("the forms of others are being read: try again later") from None
        kept = None
        try:
            if process is None or not process.is_alive:
                process = _Process(self._setup)
            problem = process.ask(grammar)
            kept = process
            return problem
        except _Died as death:
            return str(death)
        finally:
            self._free.put(kept)


class _Died(Exception):
    """The process did not live through a grammar; the message is for who sent it."""


class _Process:
    """One process that compiles."""

    def __init__(self, setup: dict[str, Any]) -> None:
        # -P: what lies beside the program is not to be taken for the standard library
        program = [sys.executable, "-P", str(Path(compile_forms.__file__))]
        self._process = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._send(setup)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, grammar: str) -> str | None:
        """What is wrong with a grammar, None if nothing is. Raises _Died."""
        self._send(grammar)
        deadline = time.monotonic() + WAIT
        head = self._read(4, deadline)
        answer = self._read(int.from_bytes(head, "big"), deadline)
        problem: str | None = compile_forms.parse(answer)
        return problem

    def close(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _send(self, value: Any) -> None:
        assert self._process.stdin is not None
        try:
            compile_forms.write_message(self._process.stdin, value)
        except OSError:
            self._bury()

    def _read(self, size: int, deadline: float) -> bytes:
        assert self._process.stdout is not None
        file, found = self._process.stdout.fileno(), b""
        poll = select.poll()  # select() knows the first 1,024 files only
        poll.register(file, select.POLLIN)
        while len(found) < size:
            ready = poll.poll(1000 * max(0.0, deadline - time.monotonic()))
            part = os.read(file, size - len(found)) if ready else b""
            if not part:
                self._bury(is_late=not ready)
            found += part
        return found

    def _bury(self, *, is_late: bool = False) -> None:
        """Say of what it died. Raises _Died."""
        if not is_late:
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                is_late = True
        code = -(self._process.returncode or 0)
        self.close()
        if is_late or code == signal.SIGXCPU:
            raise _Died(f"it takes longer than the {SECONDS} s in which a form has to be compiled")
        if code in (signal.SIGSEGV, signal.SIGBUS):
            raise _Died(
                "its definitions or rules refer to one another too deeply: compiling a form may take "
                f"{STACK >> 20} MiB of stack, which is enough for some hundred levels"
            )
        raise _Died(f"it needs more than the {MEMORY >> 20} MiB in which a form has to be compiled")


def with_stack(size: int, work: Callable[[], Result]) -> Result:
    """What `work` gives or raises, done in a thread with so many bytes of stack."""
    done: list[Result] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="form")
    with _STACKS:  # the size is one for all threads that begin; one more with much of it does no harm
        before = threading.stack_size(size)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    if failed:
        raise failed[0]
    return done[0]
