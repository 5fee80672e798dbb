"""What is assumed and what is counted of a simulated fleet: plain values."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """Seconds: of a step that computes nothing, more for each row, each adapter and each token of a prompt; of copying
    an adapter into a slot; of reading and checking one, and of asking a remote for it; bytes a second from there; of
    the way through the gateway."""

    step: float = 0.0040
    row: float = 0.000075
    adapter: float = 0.00007
    prompt_token: float = 0.00003
    slot: float = 0.005
    read: float = 0.065
    remote: float = 0.05
    bandwidth: float = 125e6
    hop: float = 0.015


@dataclass(frozen=True)
class Shape:
    """What each replica has: requests at once, adapters in slots and in memory, bytes of one, tokens of keys and values
    and of a step."""

    requests: int = 64
    slots: int = 16
    memory: int = 240
    adapter_bytes: int = 66_000_000
    kv_tokens: int = 65_536
    step_tokens: int = 2048


@dataclass(eq=False)
class Asked:
    """One request, and what became of it: `came` and `first` are seconds, `tokens` what it was given."""

    number: int
    adapter: int
    key: str
    num_prompt: int
    num_answer: int
    came: float
    first: float | None = None
    ended: float | None = None
    tokens: int = 0
    place: str = ""
    tries: int = 0
    is_warm: bool = False
    why: str | None = None  # it was refused


@dataclass
class Tally:
    """What a replica has done: seconds in steps, rows of them, adapters that were read, and brought from a remote."""

    busy: float = 0.0
    row_seconds: float = 0.0
    num_steps: int = 0
    num_tokens: int = 0
    num_read: int = 0
    num_brought: int = 0
