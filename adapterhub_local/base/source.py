"""Where a base comes from: a transformers folder or a GGUF file, read one tensor at a time.

A Hub id becomes a folder before it gets here (`hub/model.py`). Never runs code from a checkpoint.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from adapterhub_local.base.bounds import LIMITS, check_files, check_settings
from adapterhub_local.base.experts import joined_parts
from adapterhub_local.base.gguf_header import read_gguf_header
from adapterhub_local.base.gguf_tokenizer import answer_ends, gguf_tokenizer
from adapterhub_local.base.multimodal import is_multimodal, text_part
from adapterhub_local.base.prequantised import FP8, SCALE, check_method, from_fp8, held_parts, weight_names
from adapterhub_local.base.quantisation import Quantisation
from adapterhub_local.errors import BadFile, NotFound, QhubError
from adapterhub_local.lora.header import read_header
from adapterhub_local.regular import read_regular

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# GGUF architectures whose tensors are the model's own, but for the order of rows of q and k in llama's
STREAMED_GGUF = {"llama": True, "qwen2": False, "qwen3": False}


@dataclass(frozen=True)
class Source:
    """A model: its config, tokenizer, and `read(name)` for each tensor in `names`, in 16 or 32 bits.

    `held` gives the stored tensors of a weight that is in 4 bits already, by name, and None for others. `left_out` is
    what of the checkpoint is not taken, for people.
    """

    config: Any
    tokenizer: PreTrainedTokenizerBase
    generation: GenerationConfig | None
    names: frozenset[str]
    read: Callable[[str], torch.Tensor]
    held: Callable[[str, tuple[int, ...]], Mapping[str, torch.Tensor] | None] = lambda name, shape: None
    left_out: tuple[str, ...] = ()
    quantisation: Quantisation | None = None  # how it is quantised already


def open_source(path: Path) -> Source:
    """Open a transformers folder or a `.gguf` file. Raises NotFound or BadFile with what to give instead."""
    if not path.exists():
        raise NotFound(
            f"there is no folder or file {path}: give a transformers folder, a .gguf file or a Hub id (ORG/NAME)"
        )
    try:
        return _open_folder(path) if path.is_dir() else _open_gguf(path)
    except QhubError:
        raise
    except BaseException as error:
        raise not_a_model(path, error) from None


def check_finite(name: str, tensor: torch.Tensor, where: str = "the checkpoint") -> None:
    """Raises BadFile for a tensor that would make what is computed with it no numbers, naming it and its model."""
    # least and largest are NaN if any is: that takes a small part of what quantising does
    if not tensor.is_floating_point() or not tensor.numel() or torch.stack(torch.aminmax(tensor)).isfinite().all():
        return
    kind = str(tensor.dtype).removeprefix("torch.")
    raise BadFile(f"{name} has NaN or infinity in it, as {kind}: {where} is damaged, or its numbers are too large")


def not_a_model(path: Path, error: BaseException) -> BaseException:
    """BadFile with the first sentence of what a library said of a foreign model, whatever kind of error that was.

    What does not come from the model (the user's Ctrl-C, a full memory) stays what it is.
    """
    is_panic = type(error).__name__ == "PanicException"  # of tokenizers, in Rust; not an Exception in Python
    if isinstance(error, QhubError | MemoryError | torch.OutOfMemoryError) or not (
        isinstance(error, Exception) or is_panic
    ):
        return error
    if isinstance(error, RecursionError):
        return BadFile(f"{path} cannot be read as a causal language model: it is nested too deeply")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]  # `Validation error for field 'x':` and why
    return BadFile(f"{path} cannot be read as a causal language model: {reason[:300]}")


def _open_folder(folder: Path) -> Source:
    if not (folder / "config.json").is_file():
        raise BadFile(f"{folder} is not a transformers model: it has no config.json")
    check_files(folder)
    files = _weight_files(folder)
    fields = json.loads((folder / "config.json").read_bytes())
    check_settings(fields, str(folder / "config.json"), num_tensors=len(files))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    given = getattr(config, "quantization_config", None)
    method: dict[str, Any] = given if isinstance(given, dict) else given.to_dict() if given else {}
    kind = check_method(method, folder) if method else None
    quantisation = kind if isinstance(kind, Quantisation) else None
    if kind:
        del config.quantization_config
    left_out: tuple[str, ...] = ()
    if is_multimodal(config):
        config, stored = text_part(config, files)
        left_out = tuple(sorted({name.split(".")[0] if name.split(".")[0] != "model" else ".".join(name.split(".")[:2])
                                 for name in set(files) - set(stored.values())}))  # fmt: skip
    else:
        stored = _model_names(files, config)

    parts = joined_parts(config, {name: read_header(files[key]).tensors[key].shape for name, key in stored.items()})
    stored |= {name: stored[part.name] for name, part in parts.items()}
    for name in {part.name for part in parts.values()}:
        del stored[name]

    def stored_tensor(name: str) -> torch.Tensor:
        key = stored[name]
        with safe_open(files[key], framework="pt") as file:
            if name in parts:  # of all experts, one expert's rows alone are read
                return parts[name].cut(file.get_slice(key))
            tensor: torch.Tensor = file.get_tensor(key)
            return tensor

    def read(name: str) -> torch.Tensor:
        tensor = stored_tensor(name)
        if kind == FP8 and name + SCALE in stored:
            return from_fp8(tensor, stored_tensor(name + SCALE), tuple(method["weight_block_size"]), name)
        return tensor

    def held(name: str, shape: tuple[int, ...]) -> Mapping[str, torch.Tensor] | None:
        return held_parts(quantisation, name, shape, stored_tensor, stored) if quantisation else None

    generation = GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").is_file() else None
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    names = weight_names(stored, kind) if kind else stored
    return Source(config, tokenizer, generation, frozenset(names), read, held, left_out, quantisation)


def _model_names(files: Iterable[str], config: Any) -> dict[str, str]:
    """The model's name of each tensor -> its name in the checkpoint, where transformers renames on loading.

    GPT-NeoX's checkpoints say embed_out, its model lm_head. Tensors that would have to be joined keep their names.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    renamings = [entry for entry in get_model_conversion_mapping(model) if type(entry) is WeightRenaming]
    known = set(model.state_dict())

    def renamed(name: str) -> str:
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        return name

    return {name if name in known else renamed(name): name for name in files}


def _weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file that holds it."""
    if (folder / INDEX).is_file():
        index = json.loads(read_regular(folder / INDEX, LIMITS[INDEX]))
        listed = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(listed, dict) or not all(isinstance(shard, str) for shard in listed.values()):
            raise BadFile(f"{folder / INDEX} has no weight_map from tensors to files")
        paths = [folder / Path(shard).name for shard in sorted(set(listed.values()))]
        if missing := next((path.name for path in paths if not path.is_file()), None):
            raise BadFile(f"{folder / INDEX} names {missing[:100]}, which is not a file there")
    elif (folder / SINGLE).is_file():
        paths = [folder / SINGLE]
    elif list(folder.glob("pytorch_model*.bin")):
        raise BadFile(
            f"{folder} holds pickled weights, which can run code: save it as safetensors with transformers first"
        )
    else:
        raise BadFile(f"{folder} has no {SINGLE}")
    return {name: path for path in paths for name in read_header(path).tensors}


def _open_gguf(path: Path) -> Source:
    """GGUF is dequantised tensor by tensor; https://github.com/ggml-org/ggml/blob/master/docs/gguf.md."""
    import gguf

    header = read_gguf_header(path)
    check_settings({key: value for key, value in header.settings.items() if not key.startswith("tokenizer.")},
                   str(path), num_tensors=len(header.tensors))  # fmt: skip
    if len(str(header.settings.get("tokenizer.chat_template", ""))) > LIMITS["chat_template.jinja"]:
        raise BadFile(f"{path}: its chat template has more than {LIMITS['chat_template.jinja']:,} bytes")
    architecture = header.architecture
    if header.settings.get(f"{architecture}.expert_count"):
        raise BadFile(
            f"{path} is a mixture of experts, which is not taken from GGUF: give the transformers folder or the Hub id "
            "that it was made from"
        )
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise BadFile(f"{path} is a GGUF file that cannot be read: {str(error)[:200]}") from None
    with TemporaryDirectory() as alone:  # transformers would also read a tokenizer_config.json that lies beside it
        (Path(alone) / "model.gguf").symlink_to(path.absolute())
        whole: dict[str, Any] = {"gguf_file": "model.gguf", "trust_remote_code": False}
        config = AutoConfig.from_pretrained(alone, **whole)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tokenizer = gguf_tokenizer(fields, path) or AutoTokenizer.from_pretrained(alone, **whole)
    ends = answer_ends(fields, tokenizer)
    generation = GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=ends) if ends else None
    if architecture not in STREAMED_GGUF:
        return _open_gguf_whole(path, config, tokenizer, generation)

    blocks = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    with torch.device("meta"):
        wanted = AutoModelForCausalLM.from_config(config, trust_remote_code=False).state_dict()
    named = {key: blocks.get_name(key, try_suffixes=(".weight", ".bias")) for key in wanted}

    def read(key: str) -> torch.Tensor:
        tensor = stored[named[key] or ""]
        weight = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))  # a copy: the file is mapped read-only
        if STREAMED_GGUF[architecture] and key.rsplit(".", 2)[-2] in ("q_proj", "k_proj"):
            heads = config.num_attention_heads if ".q_proj." in key else config.num_key_value_heads
            weight = _unpermute(weight, heads)
        return weight

    return Source(config, tokenizer, generation, frozenset(key for key in wanted if named[key] in stored), read)


def _open_gguf_whole(
    path: Path, config: Any, tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None
) -> Source:
    """Through transformers' own conversion, which needs the whole 16-bit model in memory at once."""
    from transformers import GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        path.absolute().parent,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        trust_remote_code=False,
    )
    state = model.state_dict()
    return Source(config, tokenizer, generation, frozenset(state), state.__getitem__)


def _unpermute(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of llama's q and k back from GGUF's interleaved rotary order to transformers' half-split order."""
    half = weight.shape[0] // num_heads // 2
    return weight.reshape(num_heads, half, 2, *weight.shape[1:]).swapaxes(2, 1).reshape(weight.shape)
