"""`qhub base add`: quantise a model to 4 bits once, one layer at a time, into a folder transformers loads."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from adapterhub_local.base.bases import BaseInfo, check_base_name, write_record
from adapterhub_local.base.chat_template import given_template
from adapterhub_local.base.experts import build_model, check_experts
from adapterhub_local.base.fingerprint import Record, fingerprint, tensor_record
from adapterhub_local.base.load import quiet_loading
from adapterhub_local.base.model import BaseModel
from adapterhub_local.base.quantisation import OURS, Quantisation
from adapterhub_local.base.quantise import quantise, quantised_modules, skipped_modules
from adapterhub_local.base.read_back import read_back
from adapterhub_local.base.source import INDEX, SINGLE, Source, check_finite, not_a_model, open_source
from adapterhub_local.durable import place_folder, staging
from adapterhub_local.errors import BadFile, InUse
from adapterhub_local.lora.write import write_safetensors
from adapterhub_local.registry.rows import now
from adapterhub_local.settings import Home

SHARD_BYTES = 512 << 20  # what is held in memory at once, whatever the size of the model
Progress = Callable[[int, int], None]


def add_base(
    name: str,
    path: Path,
    home: Home,
    *,
    hub_id: str | None = None,
    revision: str | None = None,
    source_name: str | None = None,
    is_private: bool = False,
    licence: str | None = None,
    chat_template: str | None = None,
    progress: Progress | None = None,
) -> BaseInfo:
    """Quantise the model at `path` (a transformers folder or a GGUF file) into the home's base `name`.

    A folder that is in 4 bits already is taken as it is; of a model that also sees or hears, the text part. With
    `chat_template`, a name or a .jinja file, the base has this one and not the model's.

    The base appears whole or not at all, and is read back before (`base/read_back.py`), or says why it was not.
    `progress(done, total)` counts tensors, written and read back. Writing takes near one shard of the result plus one
    layer of memory, reading back what the base takes; where that is not free, it is not read back.

    Raises InUse if the name is taken, BadFile if the model cannot be used: other tensors than its architecture has,
    quantised in another way, pickled, needs own code; or if what was written is not what the source is; InputError for
    a chat template that is not there or does not write what the user says.
    """
    target = home.bases / check_base_name(name)
    if target.exists():
        raise InUse(f"base '{name}' exists already: choose another name, or remove it with `qhub base rm {name}`")
    with quiet_loading(), staging(home.tmp) as stage:
        folder = stage / "base"
        folder.mkdir()
        source = open_source(path)
        if chat_template is not None:
            source.tokenizer.chat_template = given_template(chat_template, source.tokenizer)
        try:
            with torch.device("meta"):
                model = build_model(source.config)
        except Exception as error:
            raise not_a_model(path, error) from None
        check_experts(model)
        _check_ends(source)
        count = progress or (lambda done, total: None)
        written = _write_weights(folder, source, model, lambda done, total: count(done, 2 * total))
        source.config.dtype = written.dtype
        compute = str(written.dtype).removeprefix("torch.")
        source.config.quantization_config = written.kind.config(skipped_modules(model), compute)
        for key in ("_name_or_path", "_model_name_or_path"):  # paths and names of the machine it came from
            source.config.__dict__.pop(key, None)
        source.config.save_pretrained(folder)
        if source.generation is not None:
            source.generation.save_pretrained(folder)
        source.tokenizer.save_pretrained(folder)
        info = BaseInfo(
            name=name,
            fingerprint=fingerprint(written.records, source.config, source.tokenizer),
            architecture=type(model).__name__,
            num_parameters=written.num_parameters,
            num_quantised=written.num_quantised,
            bits_per_weight=8 * written.quantised_bytes / written.num_quantised,
            bits_per_parameter=8 * written.total_bytes / written.num_parameters,
            size=sum(file.stat().st_size for file in folder.iterdir()),
            max_length=getattr(source.config, "max_position_embeddings", None),
            has_chat_template=source.tokenizer.chat_template is not None,
            source=source_name or path.name,
            hub_id=hub_id,
            revision=revision,
            created_at=now(),
            folder=target,
            is_private=is_private,
            licence=licence,
            left_out=source.left_out,
            chat_template=chat_template and Path(chat_template).name,
            quantisation=written.kind.name,
        )
        unread = read_back(
            replace(info, folder=folder), source, written.dtype, lambda done, total: count(total + done, 2 * total)
        )
        info = replace(info, not_read_back=unread)
        write_record(folder, info)
        place_folder(folder, target)
    return info


def _check_ends(source: Source) -> None:
    """Raises BadFile if a model names tokens that end an answer and has none of them: no answer would end."""
    size = source.config.vocab_size
    given = [getattr(source.generation, "eos_token_id", None), getattr(source.config, "eos_token_id", None)]
    given.append(source.tokenizer.eos_token_id)
    ends = [one for ids in given for one in (ids if isinstance(ids, list) else [ids]) if one is not None]
    if ends and not any(0 <= end < size for end in ends):
        raise BadFile(
            f"eos_token_id is {ends[0]}, which is not one of the {size:,} tokens of the model: no answer would end. "
            "Correct it in config.json and generation_config.json"
        )


class _Weights:
    """Collects tensors into shards, with what the record needs to know of them."""

    def __init__(self, folder: Path, dtype: torch.dtype, kind: Quantisation) -> None:
        self.folder, self.dtype, self.kind = folder, dtype, kind
        self.records: list[Record] = []
        self.shards: list[list[str]] = []
        self.num_parameters = self.num_quantised = self.quantised_bytes = self.total_bytes = 0
        self._held: dict[str, torch.Tensor] = {}
        self._held_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self.records.append(tensor_record(name, tensor))
        self._held[name] = tensor
        self._held_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes
        if self._held_bytes >= SHARD_BYTES:
            self._flush()

    def add_plain(self, name: str, tensor: torch.Tensor) -> None:
        """One that is not quantised."""
        self.num_parameters += tensor.numel()
        self.add(name, tensor)

    def add_quantised(self, name: str, count: int, parts: Mapping[str, torch.Tensor]) -> None:
        """A weight of `count` elements with its constants."""
        self.num_parameters += count
        self.num_quantised += count
        for key, part in parts.items():
            self.add(key, part)
            if key == name or key.rsplit(".", 1)[-1] in self.kind.constants:
                self.quantised_bytes += part.nbytes

    def _flush(self) -> None:
        shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self._held.items()}
        path = self.folder / f"shard-{len(self.shards)}"
        write_safetensors(path, shapes, self._held.items(), {"format": "pt"})
        self.shards.append(list(self._held))
        self._held, self._held_bytes = {}, 0

    def close(self) -> None:
        """Write what is held and give the shards the names transformers expects."""
        if self._held:
            self._flush()
        count = len(self.shards)
        if count == 1:
            (self.folder / "shard-0").rename(self.folder / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self.shards):
            shard = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            (self.folder / f"shard-{number}").rename(self.folder / shard)
            weight_map |= dict.fromkeys(names, shard)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        (self.folder / INDEX).write_text(json.dumps(index))


def _write_weights(folder: Path, source: Source, model: BaseModel, progress: Progress) -> _Weights:
    """Read, quantise or cast, and write every tensor of the model, in its own order."""
    dtype = torch.float16 if source.config.dtype == torch.float16 else torch.bfloat16
    weights = _Weights(folder, dtype, source.quantisation or OURS)
    to_quantise = {f"{name}.weight" for name in quantised_modules(model)}
    names = _own_tensors(model)
    _check_names(names, set(model.state_dict()), source)
    for done, (name, shape) in enumerate(names.items()):
        progress(done, len(names))
        if name in to_quantise and (parts := source.held(name, shape)) is not None:
            for key, part in parts.items():
                check_finite(key, part)
            weights.add_quantised(name, math.prod(shape), parts)
            continue
        tensor = source.read(name)
        if tuple(tensor.shape) != shape:
            raise BadFile(f"{name} has shape {tuple(tensor.shape)}, its architecture wants {shape}")
        if tensor.is_floating_point():
            tensor = tensor.to(dtype)
        check_finite(name, tensor)
        if name not in to_quantise:
            weights.add_plain(name, tensor)
        elif source.quantisation:
            raise BadFile(
                f"{name} is in 16 bits beside others in {weights.kind.title}, and every linear layer of a base is in 4 "
                "bits: give the 16-bit model, or its copy in which all of them are quantised (Unsloth's *-bnb-4bit)"
            )
        else:
            weights.add_quantised(name, tensor.numel(), dict(quantise(name, tensor, weights.kind)))
    weights.close()
    progress(len(names), len(names))
    return weights


def _own_tensors(model: BaseModel) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the model's tensors; of tied ones (input and output embeddings) the first only."""
    seen: set[int] = set()
    own = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            own[name] = tuple(tensor.shape)
    return own


def _check_names(wanted: dict[str, tuple[int, ...]], known: set[str], source: Source) -> None:
    missing = sorted(set(wanted) - source.names)
    extra = sorted(name for name in source.names - known if not name.endswith("inv_freq"))
    if missing or extra:
        what = (
            f"no {missing[0]} (and {len(missing) - 1} more)"
            if missing
            else f"{extra[0]} (and {len(extra) - 1} more) too many"
        )
        raise BadFile(f"the checkpoint is not what its config says ({type(source.config).__name__}): it has {what}")
