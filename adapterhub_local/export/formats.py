"""The formats that a version is exported in, one a row: a new one is a file with a function, and a row here.

    written = export(Request(version, home, Path("sentiment.gguf")), "gguf")

Nothing heavy is imported before the chosen format's own module.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapterhub_local.durable import check_absent
from adapterhub_local.errors import InputError
from adapterhub_local.registry import Version
from adapterhub_local.settings import Home


@dataclass(frozen=True)
class Request:
    """What to write where. The fields after `base` are options, which only some formats have (`Format.options`)."""

    version: Version
    home: Home
    target: Path
    base: str | None = None  # the base's name here, if the version does not know its own
    onto: str | None = None  # the 16-bit model to add to: a folder, a .gguf file or a Hub id
    requantise: str | None = None  # the name of a 4-bit base to make of it too
    kind: str | None = None  # the type of a GGUF's matrices
    vocabulary: Path | None = None  # a GGUF of the same model to take the vocabulary from
    check: bool = True  # hold what is written against base and adapter before it is kept
    progress: Callable[[int, int], None] = field(default=lambda done, total: None, repr=False)


TYPES = ("f16", "q8_0", "bf16", "f32")  # of a GGUF's matrices; the first is the default
OPTIONS = {"onto": "--onto", "requantise": "--requantise", "kind": "--type", "vocabulary": "--vocabulary"}


@dataclass(frozen=True)
class Written:
    """What was written: for programs, for people, and what its readers do otherwise than we."""

    report: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Format:
    """One row: what `--to` calls it, how the file must end (None: it is a folder), what it is for, who writes it."""

    name: str
    suffix: str | None
    summary: str
    writer: str  # module:function(Request) -> Written, in this package
    options: frozenset[str] = frozenset()
    example: str = ""


FORMATS = {
    row.name: row
    for row in (
        Format("file", ".safetensors", "one file for `qhub merge` and `qhub add`", "plain:write_file"),
        Format("peft", None, "what PEFT and vLLM load", "plain:write_peft"),
        Format("gguf", ".gguf", "the adapter for llama.cpp: --lora FILE", "gguf:export"),
        Format(
            "fused", None, "base and adapter as one 16-bit model", "fused:export", frozenset({"onto", "requantise"})
        ),
        Format(
            "fused-gguf", ".gguf", "base and adapter as one GGUF: llama.cpp, LM Studio", "gguf_model:export",
            frozenset({"kind", "vocabulary"}),
        ),
        Format(
            "ollama", None, "the same with a Modelfile: ollama create NAME -f folder/Modelfile", "ollama:export",
            frozenset({"kind", "vocabulary"}),
        ),
    )
}  # fmt: skip


def export(request: Request, name: str) -> Written:
    """Write `request` in the format called `name`.

    Raises InputError for an unknown format, a wrong ending or an option of another format, InUse if the target exists,
    and what the format's writer raises; nothing is left behind then.
    """
    if name not in FORMATS:
        raise InputError(f"there is no format '{name}': choose one of {', '.join(FORMATS)}")
    row = FORMATS[name]
    for option, spelled in OPTIONS.items():
        if getattr(request, option) is not None and option not in row.options:
            having = [other.name for other in FORMATS.values() if option in other.options]
            raise InputError(f"{spelled} is for --to {' and '.join(having)}, not for {name}")
    if row.suffix is not None and request.target.suffix != row.suffix:
        raise InputError(f"{request.target} must end in {row.suffix}")
    check_absent(request.target)
    module, _, function = row.writer.partition(":")
    written: Written = getattr(importlib.import_module(f"adapterhub_local.export.{module}"), function)(request)
    return written
