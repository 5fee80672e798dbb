"""FormCompiler: forms are tried in another process first, so that none can end or fill up this one."""

import json
import queue
import signal
import threading
from collections import OrderedDict
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

from llguidance import LLMatcher, LLTokenizer

from adapterhub_local.apart import Apart, Died
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
        self._setup = json.dumps({"tokenizer": tokenizer, "size": size, "end_tokens": end_tokens}).encode()
        self._free: queue.LifoQueue[Apart | None] = queue.LifoQueue()
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
            raise Busy("other forms are being compiled: try again later") from None
        kept = None
        try:
            if process is None or not process.is_alive:
                process = Apart(Path(compile_forms.__file__))
                process.send(self._setup)
            process.send(json.dumps(grammar).encode())
            problem: str | None = json.loads(process.receive(WAIT))
            kept = process
            return problem
        except Died as death:
            return _reason(death)
        finally:
            if process is not None and kept is None:
                process.close()
            self._free.put(kept)


def _reason(death: Died) -> str:
    """Of what a process died."""
    if death.is_late or death.number == signal.SIGXCPU:
        return f"it takes longer than the {SECONDS} s in which a form has to be compiled"
    if death.number in (signal.SIGSEGV, signal.SIGBUS):
        return (
            "its definitions or rules refer to one another too deeply: compiling a form may take "
            f"{STACK >> 20} MiB of stack, which is enough for some hundred levels"
        )
    return f"it needs more than the {MEMORY >> 20} MiB in which a form has to be compiled"


def with_stack(size: int, work: Callable[[], Result]) -> Result:
    """What `work` gives or raises, done in a thread with this many bytes of stack."""
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
