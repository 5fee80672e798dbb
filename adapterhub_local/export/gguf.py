"""A version as a GGUF adapter for llama.cpp and what is built on it (`--lora adapter.gguf`).

The format has one alpha for all modules, and its readers know neither rsLoRA nor patterns: they scale each
module by alpha / rank. So the adapter is first brought to one rank with alpha = rank, which is exact.
"""

from pathlib import Path
from typing import Any

import torch

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.shapes import check_shapes, tied_weights
from adapterhub_local.durable import check_absent, place_file, staging
from adapterhub_local.errors import Incompatible
from adapterhub_local.export.families import GgufLayout
from adapterhub_local.export.formats import Request, Written
from adapterhub_local.export.opening import open_request
from adapterhub_local.lora.adapter import AdapterFile, Delta
from adapterhub_local.merge.algebra import pad_rank, weighted_sum

FINGERPRINT = "qhub.base_fingerprint"  # which base exactly it is for


def export(request: Request) -> Written:
    """The version as a GGUF adapter; see `write_gguf`."""
    adapter, base = open_request(request)
    version = request.version
    rank = write_gguf(adapter, base, request.target, name=str(version), digest=version.content_digest)
    return Written({"rank": rank, "base": base.name}, f"rank and alpha {rank}, for a GGUF of {base.name}")


def write_gguf(adapter: AdapterFile, base: BaseInfo, target: Path, *, name: str, digest: str | None = None) -> int:
    """Write the adapter as one GGUF file and return its rank, which is its alpha too.

    Raises InUse if `target` exists, Incompatible for an architecture whose tensors GGUF names or orders in ways
    not known here, an adapted output head that is tied to the embeddings, and DoRA or rows of embeddings, which the
    format cannot hold.
    """
    import gguf

    check_absent(target)
    check_shapes(adapter, base)
    if adapter.magnitudes:
        raise Incompatible(
            f"{name} has DoRA, and a GGUF adapter holds A and B only: export it --to fused, or make a plain adapter "
            f"of it with `qhub merge {name} --weights 1 --with-base {base.name} --name NAME`, which reports the loss"
        )
    if adapter.tokens:
        raise Incompatible(
            f"{name} has rows of the embeddings for {len(adapter.token_ids)} tokens, and a GGUF adapter holds factors "
            "of matrices only: llama.cpp has no place for rows. Export it --to fused or fused-gguf"
        )
    tied = {name.removesuffix(".weight") for name in tied_weights(base)}
    layout = GgufLayout(base)
    rank = max(shape.rank for shape in adapter.shapes.values())
    with staging(target.absolute().parent, prefix=".qhub-") as stage:
        writer = gguf.GGUFWriter(stage / "adapter.gguf", gguf.MODEL_ARCH_NAMES[layout.architecture])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
        writer.add_name(name)
        write_origin(writer, base, digest)
        for module, delta in adapter.deltas():
            known = layout.tensor_name(f"{module}.weight")
            if known is None or module in tied:
                why = "it is tied to the embeddings there" if module in tied else "the format has no place for it"
                raise Incompatible(
                    f"{name} adapts {module}, which has no tensor of its own in a GGUF of base '{base.name}': {why}. "
                    "Export it with --to fused or fused-gguf"
                )
            normal = normal_form(delta, rank)
            for factor, tensor in (("a", normal.A), ("b", layout.to_gguf(module, normal.B))):
                writer.add_tensor(f"{known}.lora_{factor}", tensor.to(_stored(adapter.dtype)).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        place_file(stage / "adapter.gguf", target)
    return rank


def normal_form(delta: Delta, rank: int) -> Delta:
    """The same delta with scaling 1 and factors of exactly `rank`, in float32."""
    return pad_rank(weighted_sum([delta], [1.0]), rank)


def write_origin(writer: Any, base: BaseInfo, digest: str | None) -> None:
    """Add which base a file belongs to, and which version's content it has."""
    if base.hub_id:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base.hub_id.rpartition("/")[2])
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{base.hub_id}")
    writer.add_string(FINGERPRINT, base.fingerprint)
    if digest:
        writer.add_string("qhub.content_digest", digest)


def _stored(dtype: torch.dtype) -> torch.dtype:
    """float16 stays; bfloat16, which NumPy has not, and wider types become float32."""
    return torch.float16 if dtype == torch.float16 else torch.float32
