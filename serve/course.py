"""Course: what became of one request so far, for whoever counts or traces it when it has ended."""

from dataclasses import dataclass, field

MAX_MODEL = 256  # characters of what a client may write


@dataclass
class Course:
    """Times are of time.monotonic(), None where it did not come so far.

    ready     its prompt was read, its adapter was in memory, and it was put into the queue
    begun     the engine took it out of the queue
    first     its first token; `last` the newest
    failed    the status of an error that came after its answer had begun
    """

    model: str = ""  # as it was asked for
    label: str | None = None  # what its adapter, or the base, is shown as in counts, once it is found
    names: tuple[str, ...] = ()  # that stand in it
    adapter: str | None = None  # the version
    digest: str | None = None
    ready: float | None = None
    begun: float | None = None
    first: float | None = None
    last: float | None = None
    num_prompt: int = 0
    num_completion: int = 0
    reasons: list[str] = field(default_factory=list)
    failed: int | None = None
