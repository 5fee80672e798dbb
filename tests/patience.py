"""How long a test waits for what must come and must end: far above what either takes, on any machine.

A test shows that something comes or ends, never how fast: a machine that does much else is several times slower.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE = 120.0  # seconds for what must come
WORK = 30.0  # seconds of this process for what must end; all that is held to it takes below 2 on a quiet machine


@contextmanager
def ends() -> Iterator[None]:
    """Work in proportion to what is given, where the mistake a test guards against would take minutes or forever."""
    start = time.process_time()
    yield
    assert time.process_time() - start < WORK
