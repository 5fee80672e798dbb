"""EngineOptions: how much memory and how many rows the engine may use."""

from dataclasses import dataclass
from typing import Any

from adapterhub_local.errors import InputError
from adapterhub_local.options import check_options, on_gpu, option


@dataclass(frozen=True)
class EngineOptions:
    """Limits of one engine; each is checked here, so that the engine need not. Sizes are in bytes.

    What a field means and where it may lie is in its option. On a GPU, where a step of few rows takes about as long as
    one of many, some defaults are others: `EngineOptions.on("cuda")`.
    """

    max_rows: int = option(16, "Most requests that run at once.", low=1, on_gpu=64)
    max_length: int | None = option(None, "Most tokens of prompt and answer.", low=1, derived="the base's, up to 4096")
    # on the CPU, copies of what is read may take twice that again, but no more than 512 MB
    kv_bytes: int | None = option(
        None,
        "Memory for keys and values.",
        *("--kv-cache", "--kv-cache-mb"),
        low=1,
        unit="MB",
        derived="what --max-rows requests of --max-length need, or half of what is free",
    )
    tokens_per_step: int = option(512, "Tokens of one step; longer prompts are read in parts.", low=1, on_gpu=2048)
    prefill_tokens: int | None = option(
        None,
        "Most tokens of a step for prompts that take several steps, while other requests wait for a token.",
        low=1,
        derived="half of --tokens-per-step",
    )
    max_adapters: int = option(16, "Most different adapters in one batch.", low=1)
    queue_limit: int = option(256, "Requests that may wait; more are refused.", "--queue", low=1)
    adapter_bytes: int = option(
        2_000_000_000,
        "Memory for adapters kept ready, including those in use; slots on a GPU are beside it.",
        *("--adapter-memory", "--adapter-memory-mb"),
        low=1,
        unit="MB",
    )
    prefix_bytes: int = option(
        256 << 20,
        "The part of --kv-cache that may keep ended prompts and answers, so that a common beginning is computed once; "
        "0: none.",
        *("--prefix-cache", "--prefix-cache-mb"),
        low=0,
        unit="MB",
        on_gpu=2 << 30,
    )
    base_exec: str = option(
        "auto",
        "Multiply with the 4-bit weights, or with a dequantised copy of them; auto takes the faster.",
        choices=("auto", "nf4", "dequant-cache"),
    )
    base_bytes: int | None = option(
        None,
        "Memory for that copy.",
        *("--base-cache", "--base-cache-mb"),
        low=0,
        unit="MB",
        derived="a quarter of what is free",
    )
    speculation: str = option(
        "auto",
        "Guess next tokens by what came before, or must come in a given form, and check several in one step: the "
        "answers are the same, and copied text comes faster.",
        choices=("auto", "off"),
    )
    kernels: str = option(
        "auto",
        "Adapters, attention and 4-bit products by own kernels where they work (Triton on a GPU, C on a CPU), or by "
        "plain torch.",
        choices=("auto", "triton", "c", "torch"),
    )
    cuda_graphs: bool = option(True, "With kernels: replay steps as CUDA graphs.")

    @classmethod
    def on(cls, device: str, **given: Any) -> "EngineOptions":
        """What is given and not None, else what suits a `device` such as `cpu` or `cuda`. Raises InputError."""
        known = {name: value for name, value in given.items() if value is not None}
        options = {**(on_gpu(cls) if device.startswith("cuda") else {}), **known}
        if "tokens_per_step" not in known:
            options["tokens_per_step"] = max(
                options.get("tokens_per_step", cls.tokens_per_step), options.get("max_rows", cls.max_rows)
            )
        return cls(**options)

    @property
    def max_part(self) -> int:
        """Tokens of prompts that are not read to their end, in a step in which others wait for a token."""
        return self.prefill_tokens or max(1, self.tokens_per_step // 2)

    def __post_init__(self) -> None:
        check_options(self)
        if self.tokens_per_step < self.max_rows:
            raise InputError(
                f"tokens_per_step is {self.tokens_per_step}, fewer than max_rows {self.max_rows}: "
                "every running request needs one token a step"
            )
