"""Base and adapter as one GGUF model for llama.cpp, Ollama and LM Studio: weights, vocabulary, chat template."""

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.shapes import weight_shapes
from adapterhub_local.durable import check_absent, place_file, staging
from adapterhub_local.errors import Incompatible
from adapterhub_local.export.families import GgufLayout, limits
from adapterhub_local.export.formats import TYPES, Request, Written
from adapterhub_local.export.fused import counted
from adapterhub_local.export.fusion import Fusion
from adapterhub_local.export.gguf import write_origin
from adapterhub_local.export.gguf_settings import rotary_tensors, write_settings
from adapterhub_local.export.gguf_vocabulary import copy_vocabulary, model_name, write_vocabulary
from adapterhub_local.export.opening import open_request, size_text
from adapterhub_local.lora.adapter import AdapterFile

_FILE_TYPES = {"f16": 1, "q8_0": 7, "bf16": 32, "f32": 0}  # as llama.cpp's llama_ftype counts them
MODEL = "model.gguf"


@dataclass(frozen=True)
class FusedGguf:
    """Bytes written, tokens of context, and what llama.cpp computes otherwise than the model was trained."""

    size: int
    context: int
    notes: tuple[str, ...]


def export(request: Request) -> Written:
    """The version and its base as one GGUF; see `write_gguf_model`."""
    adapter, base = open_request(request)
    version, kind = request.version, request.kind or TYPES[0]
    made = write_gguf_model(
        base, adapter, request.target, name=str(version), digest=version.content_digest, kind=kind,
        vocabulary=request.vocabulary, progress=request.progress,
    )  # fmt: skip
    report = {"base": base.name, "type": kind, "size": made.size, "context": made.context}
    return Written(report, f"{size_text(made.size)}, {kind}; {version} inside {base.name}", made.notes)


def write_gguf_model(
    base: BaseInfo,
    adapter: AdapterFile | None,
    target: Path,
    *,
    name: str,
    digest: str | None = None,
    kind: str = "f16",
    vocabulary: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FusedGguf:
    """Write `base` with `adapter` added (or alone) to the file `target`, one tensor at a time.

    `kind` is the type of the matrices, one of TYPES; vectors are float32. `vocabulary` is a GGUF to take the vocabulary
    from. Raises InUse if `target` exists, Incompatible for a family, a setting or a tokenizer that llama.cpp does not
    have, a module or tensor without a place in the format, or values that `kind` cannot hold.
    """
    import gguf

    check_absent(target)
    layout, fusion = GgufLayout(base), Fusion(base, adapter)
    shapes, dtype = weight_shapes(base), layout.config.dtype or torch.bfloat16
    rows = shapes[next(key for key in shapes if layout.tensor_name(key) == "token_embd.weight")][0]
    context, notes = limits(layout.config)
    with staging(target.absolute().parent, prefix=".qhub-") as stage:
        writer = gguf.GGUFWriter(stage / MODEL, gguf.MODEL_ARCH_NAMES[layout.architecture])
        with closing(writer):
            writer.add_type(gguf.GGUFType.MODEL)
            title, more = model_name(f"{name} on {base.hub_id or base.source}", base)
            writer.add_name(title)
            notes += more
            write_origin(writer, base, digest)
            writer.add_file_type(_FILE_TYPES[kind])
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            write_settings(writer, layout, context)
            if vocabulary is None:
                notes += write_vocabulary(writer, base, rows)
            else:
                copy_vocabulary(writer, vocabulary, base, rows)
            rotary = rotary_tensors(layout)
            for key, tensor in rotary.items():
                writer.add_tensor_info(key, tuple(tensor.shape), np.dtype(np.float32), tensor.nbytes, None)
            for key in fusion.names:
                known = layout.tensor_name(key)
                if known is None:
                    raise Incompatible(f"{key} of base '{base.name}' has no place in a GGUF of its family")
                chosen = stored_type(shapes[key], kind)
                size = math.prod(gguf.quant_shape_to_byte_shape(shapes[key], chosen))
                writer.add_tensor_info(known, shapes[key], np.dtype(np.float32), size, chosen)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in rotary.values():
                writer.write_tensor_data(tensor.numpy())
            for key in counted(fusion.names, progress or (lambda done, total: None)):
                weight = fusion.read(key, dtype)[0].float()
                values = layout.to_gguf(key.rpartition(".")[0], weight) + layout.offset(key)
                writer.write_tensor_data(_stored(key, values, stored_type(shapes[key], kind)))
            fusion.check_complete()
        size = (stage / MODEL).stat().st_size
        place_file(stage / MODEL, target)
    return FusedGguf(size, context, tuple(notes))


def stored_type(shape: tuple[int, ...], kind: str) -> Any:
    """The type of a tensor: float32 for vectors, and float16 for rows that blocks of 32 do not divide."""
    import gguf

    if len(shape) < 2:
        return gguf.GGMLQuantizationType.F32
    if kind == "q8_0" and shape[-1] % 32:
        return gguf.GGMLQuantizationType.F16
    return gguf.GGMLQuantizationType[kind.upper()]


def _stored(name: str, values: torch.Tensor, kind: Any) -> np.ndarray[Any, Any]:
    import gguf

    if kind == gguf.GGMLQuantizationType.F16 and float(values.abs().max()) > torch.finfo(torch.float16).max:
        raise Incompatible(f"{name} has values that float16 cannot hold: export it with --type bf16 or f32")
    stored: np.ndarray[Any, Any] = gguf.quantize(values.contiguous().numpy(), kind)
    return stored
