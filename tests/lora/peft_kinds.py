"""Every kind of adapter that PEFT makes of a tiny Llama: those that are taken, and those that are not, with reasons."""

import copy
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

WEIGHTS = "adapter_model.safetensors"
Q0 = "model.layers.0.self_attn.q_proj"
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|v_proj|up_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:q_proj|v_proj)))"
)


@dataclass(frozen=True)
class Kind:
    """How an adapter is made: PEFT's settings, and what else is done with it."""

    settings: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype | None = None  # of the saved factors
    save: dict[str, Any] = field(default_factory=dict)  # for save_pretrained
    adapter: str = "default"
    wrap: str = ""  # put into the names of the saved tensors, before `model.layers`
    is_plain: bool = True  # has no DoRA, so that it can be merged without its base


def some(**settings: Any) -> Kind:
    """A kind that differs by settings of LoraConfig alone."""
    return Kind(settings, is_plain=not settings.get("use_dora"))


TAKEN: dict[str, Kind] = {
    "list": some(),
    "one module": some(target_modules=["down_proj"]),
    "parts of names": some(target_modules=["self_attn.q_proj", "mlp.up_proj"]),
    "full names": some(target_modules=[Q0, "model.layers.1.mlp.up_proj"]),
    "pattern": some(target_modules=r".*\.(q|v)_proj"),
    "pattern of some layers": some(target_modules=r"model\.layers\.[1]\..*(gate|up)_proj"),
    "Unsloth's pattern": some(target_modules=UNSLOTH),
    "all-linear": some(target_modules="all-linear"),
    "rank_pattern": some(rank_pattern={"q_proj": 2, "v_proj": 6}),
    "rank_pattern by full name": some(rank_pattern={Q0: 7}),
    "rank_pattern anchored": some(rank_pattern={f"^{Q0}": 3}),
    "rank_pattern by alternation": some(rank_pattern={r"layers\.1\..*(q|v)_proj": 3}),
    "alpha_pattern": some(alpha_pattern={"v_proj": 3, r".*layers\.0.*q_proj": 11.5}),
    "patterns that overlap": some(
        rank_pattern={"0.self_attn.q_proj": 6, "q_proj": 5}, alpha_pattern={"layers.0.self_attn.v_proj": 9, "v_proj": 2}
    ),
    "patterns that match no module": some(rank_pattern={"q": 9}, alpha_pattern={"z": 1, "proj": 2}),
    "rsLoRA": some(use_rslora=True),
    "rsLoRA with patterns": some(use_rslora=True, rank_pattern={"q_proj": 9}, alpha_pattern={"q_proj": 1}),
    "alpha with a fraction": some(lora_alpha=3.7),
    "negative alpha": some(lora_alpha=-5),
    "rank 1": some(r=1),
    "rank above the dimensions": some(r=130),
    "init gaussian": some(init_lora_weights="gaussian"),
    "init orthogonal": some(init_lora_weights="orthogonal"),
    "init false": some(init_lora_weights=False),
    "no task": some(task_type=None),
    "feature extraction": some(task_type="FEATURE_EXTRACTION"),
    "revision": some(revision="main"),
    "dropout": some(lora_dropout=0.2),
    "layers_to_transform": some(layers_to_transform=[0]),
    "layers_to_transform, one": some(layers_to_transform=1),
    "layers_pattern": some(layers_to_transform=[1], layers_pattern="layers"),
    "layers_pattern, list": some(layers_to_transform=[0], layers_pattern=["blocks", "layers"]),
    "exclude_modules": some(target_modules="all-linear", exclude_modules=["k_proj", "up_proj"]),
    "exclude_modules, pattern": some(target_modules=["q_proj", "v_proj"], exclude_modules=r".*layers\.1.*"),
    "exclude_modules, one layer": some(exclude_modules=[Q0]),
    "DoRA": some(use_dora=True),
    "DoRA of all": some(use_dora=True, use_rslora=True, target_modules="all-linear"),
    "lm_head": some(target_modules=["q_proj", "lm_head"]),
    "lm_head alone": some(target_modules=["lm_head"]),
    "embeddings along": Kind(save={"save_embedding_layers": True}),
    "tokens": some(trainable_token_indices=[4, 9]),
    "tokens, out of order": some(trainable_token_indices=[9, 4, 7]),
    "tokens of a module": some(trainable_token_indices={"embed_tokens": [5]}, use_rslora=True),
    "tokens of a full name": some(trainable_token_indices={"model.embed_tokens": [5, 6]}),
    "tokens of the head": some(trainable_token_indices={"lm_head": [2, 7]}),
    "tokens of both": some(trainable_token_indices={"embed_tokens": [4], "lm_head": [2, 7]}),
    "tokens in bfloat16": Kind({"trainable_token_indices": [4, 9]}, dtype=torch.bfloat16),
    "tokens of a compiled model": Kind({"trainable_token_indices": {"embed_tokens": [4, 9]}}, wrap="_orig_mod."),
    "tokens of an adapter with a name": Kind({"trainable_token_indices": [4, 9]}, adapter="mine"),
    "bfloat16": Kind(dtype=torch.bfloat16),
    "float16": Kind(dtype=torch.float16),
    "named adapter": Kind(adapter="mine"),
    "compiled": Kind(wrap="_orig_mod."),
    "wrapped twice": Kind(wrap="base_model.model."),
    "DDP": Kind(wrap="module."),
    "FSDP": Kind(wrap="_fsdp_wrapped_module."),
    "inside of a multimodal model": Kind(wrap="language_model."),
}
REFUSED: dict[str, tuple[Kind, str]] = {
    "modules_to_save": (some(modules_to_save=["lm_head"]), "modules_to_save = .*whole modules"),
    "modules_to_save, norm": (some(modules_to_save=["norm"]), "modules_to_save = .*whole modules"),
    "lora_bias": (some(lora_bias=True), "lora_bias = true.*B factors have a bias"),
    "embed_tokens": (some(target_modules=["q_proj", "embed_tokens"]), "adapts an embedding"),
    "bias all": (some(bias="all"), "bias = 'all': it changes biases"),
    "bias lora_only": (some(bias="lora_only"), "bias = 'lora_only': it changes biases"),
    "layer_replication": (some(layer_replication=[[0, 2], [1, 2]]), "layer_replication = .*changes the layers"),
    "PiSSA": (some(init_lora_weights="pissa"), "init_lora_weights = 'pissa': .*changed base"),
    "PiSSA fast": (some(init_lora_weights="pissa_niter_2"), "'pissa_niter_2': .*changed base"),
    "OLoRA": (some(init_lora_weights="olora"), "'olora': .*changed base"),
    "aLoRA": (some(alora_invocation_tokens=[1, 2]), "aLoRA"),
    "target_parameters": (
        some(target_modules=[], target_parameters=["model.layers.0.mlp.up_proj.weight"]), "target_parameters = "
    ),
    # PEFT saves patterns sorted, and of two that match the first counts: it cannot load this itself
    "patterns in lost order": (some(rank_pattern={"self_attn.q_proj": 3, "q_proj": 5}), "has rank 3, its config"),
    "LoHa": (Kind({"peft": "LoHaConfig"}), "peft_type must be LORA"),
    "LoKr": (Kind({"peft": "LoKrConfig"}), "peft_type must be LORA"),
    "AdaLoRA": (Kind({"peft": "AdaLoraConfig", "total_step": 10}), "peft_type must be LORA"),
    "OFT": (Kind({"peft": "OFTConfig", "r": 0, "oft_block_size": 4}), "peft_type must be LORA"),
    "IA3": (Kind({"peft": "IA3Config", "feedforward_modules": []}), "peft_type must be LORA"),
    "VeRA": (Kind({"peft": "VeraConfig"}), "peft_type must be LORA"),
}  # fmt: skip


def load(folder: Path) -> Any:
    """The tiny model in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make(model: Any, kind: Kind, folder: Path) -> tuple[Path, Any]:
    """The folder that PEFT saves of this kind, its numbers random, and the PEFT model itself (a copy of `model`)."""
    import peft

    settings = dict(kind.settings)
    config_class = getattr(peft, settings.pop("peft", "LoraConfig"))
    if config_class is peft.LoraConfig:
        settings = {"r": 4, "lora_alpha": 12, **settings}
    settings = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(copy.deepcopy(model), config_class(**settings), adapter_name=kind.adapter)
        generator = torch.Generator().manual_seed(5)
        for name, parameter in made.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
                if kind.dtype is not None:
                    parameter.data = parameter.data.to(kind.dtype)
            elif "trainable_tokens_delta" in name:
                parameter.data = parameter.data + torch.randn(parameter.shape, generator=generator) * 0.2
                if kind.dtype is not None:
                    parameter.data = parameter.data.to(kind.dtype)
            elif "magnitude" in name:
                parameter.data *= 1 + 0.2 * torch.rand(parameter.shape, generator=generator)
        made.peft_config[kind.adapter].base_model_name_or_path = "someone/tiny"
        made.save_pretrained(folder, **kind.save)
    if kind.adapter != "default":
        folder = folder / kind.adapter
    if kind.wrap:
        tensors = load_file(folder / WEIGHTS)
        start = "base_model.model."
        renamed = {start + kind.wrap + name.removeprefix(start): value for name, value in tensors.items()}
        save_file(renamed, folder / WEIGHTS, metadata={"format": "pt"})
    if kind.dtype is not None:  # what is computed with is the saved numbers in float32
        made = made.float()
    return folder, made.eval()


def logits_by_peft(model: Any, folder: Path, *, low: bool) -> torch.Tensor:
    """What PEFT computes with the adapter in `folder`, whose every warning of a missing key is an error."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        loaded = PeftModel.from_pretrained(copy.deepcopy(model), folder, low_cpu_mem_usage=low).float().eval()
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    return logits(loaded)


def logits(model: Any) -> torch.Tensor:
    """The logits of a few tokens."""
    with torch.inference_mode():
        return model(torch.arange(3, 15)[None]).logits[0]
