"""EngineOptions: how much memory and how many rows the engine may use."""

from dataclasses import dataclass
from typing import Any

from adapterhub_local.errors import InputError

# what pays on a GPU, where a step of few rows takes about as long as one of many
ON_GPU: dict[str, Any] = {"max_rows": 64, "tokens_per_step": 2048, "prefix_bytes": 2 << 30}
BASE_EXEC = ("auto", "nf4", "dequant-cache")
KERNELS = ("auto", "triton", "c", "torch")


@dataclass(frozen=True)
class EngineOptions:
    """Limits of one engine; each is checked here, so that the engine need not.

    max_rows         requests that run at once
    max_length       tokens of one request, prompt and answer; None: the model's context, at most 4096
    kv_bytes         memory for keys and values; None: max_rows requests of max_length, or half of what is free. On the
                     CPU copies of what is read may take twice that again, but no more than 512 MB
    tokens_per_step  tokens of one forward pass; longer prompts are read in chunks
    max_adapters     different adapters in one batch
    queue_limit      requests that may wait; more are refused
    adapter_bytes    memory for adapters kept ready, those in use included
    prefix_bytes     of kv_bytes, what may hold prompts and answers that ended; 0: no request shares with another
    base_exec        `nf4`: multiply with the 4-bit weights; `dequant-cache`: with a dequantised copy of them, as far as
                     base_bytes goes; `auto`: whichever was measured to be faster
    base_bytes       memory for that copy; None: a quarter of what is free
    kernels          our own for adapters, attention and 4-bit products: `triton` on a GPU, `c` on a CPU, compiled here;
                     `torch`: none; `auto`: those that work
    cuda_graphs      on a GPU with kernels, replay decode steps that come often as CUDA graphs
    """

    max_rows: int = 16
    max_length: int | None = None
    kv_bytes: int | None = None
    tokens_per_step: int = 512
    max_adapters: int = 16
    queue_limit: int = 256
    adapter_bytes: int = 2 << 30
    prefix_bytes: int = 256 << 20
    base_exec: str = "auto"
    base_bytes: int | None = None
    kernels: str = "auto"
    cuda_graphs: bool = True

    @classmethod
    def on(cls, device: str, **given: Any) -> "EngineOptions":
        """What is given and not None, else what suits a `device` such as `cpu` or `cuda`. Raises InputError."""
        known = {name: value for name, value in given.items() if value is not None}
        options = {**(ON_GPU if device.startswith("cuda") else {}), **known}
        if "tokens_per_step" not in known:
            options["tokens_per_step"] = max(
                options.get("tokens_per_step", cls.tokens_per_step), options.get("max_rows", cls.max_rows)
            )
        return cls(**options)

    def __post_init__(self) -> None:
        positive = "max_rows max_length kv_bytes tokens_per_step max_adapters queue_limit adapter_bytes"
        for name in positive.split():
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}: it must be at least 1")
        if self.prefix_bytes < 0:
            raise InputError(f"prefix_bytes is {self.prefix_bytes}: it must be at least 0")
        for name, choices in (("base_exec", BASE_EXEC), ("kernels", KERNELS)):
            if getattr(self, name) not in choices:
                raise InputError(f"{name} is {getattr(self, name)!r}: it must be {', '.join(choices)}")
        if self.tokens_per_step < self.max_rows:
            raise InputError(
                f"tokens_per_step is {self.tokens_per_step}, fewer than max_rows {self.max_rows}: "
                "every running request needs one token a step"
            )
