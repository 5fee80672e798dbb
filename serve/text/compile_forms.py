"""The process that compiles forms before the server does: whatever they do to the compiler, only this process dies.

Run as a program, not imported: it loads llguidance and nothing else of ours. It reads messages from standard input (4
bytes, big-endian, then so many of JSON): first the tokenizer, then one grammar after the other, and answers each with
what is wrong with it, or null. A grammar may take so much time, stack and memory; who takes more ends the process, and
the signal says why.
"""

import contextlib
import json
import os
import resource
import signal
import sys
import threading
from typing import IO, Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

SECONDS = 2  # of the processor
STACK = 8 << 20
MEMORY = 512 << 20
REHEARSED = 8  # tokens: what takes long at the first of them is found here
MAX_LEXER_STATES = 50_000  # at one or two kB each


def limits() -> LLParserLimits:
    """What one grammar may use while an answer is made."""
    return LLParserLimits(max_lexer_states=MAX_LEXER_STATES)


def read_message(file: IO[bytes]) -> Any:
    """The next message, None at the end."""
    head = file.read(4)
    return parse(file.read(int.from_bytes(head, "big"))) if len(head) == 4 else None


def parse(body: bytes) -> Any:
    """What a message says."""
    return json.loads(body)


def write_message(file: IO[bytes], value: Any) -> None:
    """A message for the other side."""
    body = json.dumps(value).encode()
    file.write(len(body).to_bytes(4, "big") + body)
    file.flush()


def check(tokenizer: LLTokenizer, grammar: str) -> str | None:
    """What is wrong with a grammar; the first tokens of an answer are tried, too."""
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits())
    for number in range(REHEARSED):
        if matcher.is_error():
            return _reason(matcher) if number == 0 else None  # later another way might go on
        allowed = matcher.compute_logit_bias()
        if matcher.is_error():
            return _reason(matcher) if number == 0 else None
        token = allowed.find(b"\xc8", (number * 7919 + 1) % len(allowed))
        token = token if token >= 0 else allowed.find(b"\xc8")
        if token < 0:
            return "no answer can have this form" if number == 0 else None
        if matcher.is_stopped():
            return None
        matcher.consume_token(token)
    return None


def _reason(matcher: LLMatcher) -> str:
    error = matcher.get_error()
    return "no answer can have this form" if error.startswith("NoExtension") else error


def main() -> None:
    """Answer until the other side hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the server's whole group
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK)
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    setup = read_message(source)
    if setup is None:
        return
    tokenizer = LLTokenizer(setup["tokenizer"], n_vocab=setup["size"], eos_token=setup["end_tokens"])
    while (grammar := read_message(source)) is not None:
        error: list[str | None] = []
        with contextlib.suppress(OSError), open("/proc/self/statm", encoding="ascii") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
            _, hard = resource.getrlimit(resource.RLIMIT_AS)
            wanted = size + MEMORY if hard == resource.RLIM_INFINITY else min(size + MEMORY, hard)
            resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
        usage = resource.getrusage(resource.RUSAGE_SELF)
        spent = int(usage.ru_utime + usage.ru_stime) + 1
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        wanted = spent + SECONDS if hard == resource.RLIM_INFINITY else min(spent + SECONDS, hard)
        resource.setrlimit(resource.RLIMIT_CPU, (wanted, hard))

        def work(grammar: str = grammar, error: list[str | None] = error) -> None:
            error.append(check(tokenizer, grammar))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if not error:  # Python itself ran out of something
            os.kill(os.getpid(), signal.SIGABRT)
        write_message(sink, error[0])


if __name__ == "__main__":
    main()
