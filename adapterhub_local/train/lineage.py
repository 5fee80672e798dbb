"""Where a trained version comes from: recipe, data, base, run and environment, enough to train it again."""

import contextlib
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from typing import Any

import torch

from adapterhub_local.base.model import AdaptedModel
from adapterhub_local.durable import digest_bytes
from adapterhub_local.evaluate.evaluate import entry
from adapterhub_local.evaluate.preferences import AnyScore
from adapterhub_local.recipe.derived import optimizer_on
from adapterhub_local.train.liger import uses_liger
from adapterhub_local.train.log_curves import short_curve
from adapterhub_local.train.past_runs import read_log
from adapterhub_local.train.run_folder import Run
from adapterhub_local.train.samples import Sample
from adapterhub_local.train.tokens import trained_tokens

CURVES = {"held_out": "eval_loss", "learning_rate": "learning_rate"}  # in a lineage, and in a log
LIGER = "liger-kernel"
MAX_TEXT = 2000  # letters of each text of a sample
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "safetensors", "accelerate")


def lineage_of(
    run: Run,
    model: AdaptedModel,
    scores: Mapping[str, AnyScore],
    statistics: dict[str, Any],
    rows: int,
    samples: Sequence[Sample] = (),
) -> dict[str, Any]:
    """Where the version comes from; enough to train it again. With curves and samples, to see how it went."""
    log = read_log(run.folder)
    recipe = run.recipe
    peft_model = model.base_model
    targeted = recipe.adapter.target_modules
    settings = model.peft_config["default"]
    lineage: dict[str, Any] = {
        "kind": "train",
        "task": recipe.task,
        "description": recipe.output.description,
        "base": run.info.lineage(),
        "adapter": {
            "rank": settings.r,
            "alpha": settings.lora_alpha,
            "target_modules": targeted if isinstance(targeted, str) else list(targeted),
            **({"dora": True} if settings.use_dora else {}),
            **({"tokens": len(ids)} if (ids := trained_tokens(model)) else {}),
            "num_modules": len(peft_model.targeted_module_names),
            "num_parameters": sum(part.numel() for part in model.parameters() if part.requires_grad),
        },
        "recipe": {
            "text": recipe.text,
            "digest": digest_bytes(recipe.text.encode()),
            "resolved": recipe.to_json(),
            **({"overrides": list(recipe.overrides)} if recipe.overrides else {}),
        },
        "data": run.data,
        "seed": recipe.train.seed,
        "run": run.folder.name,
        "training": {
            **statistics,
            "curve": short_curve(log),
            **{name: kept for name, key in CURVES.items() if (kept := short_curve(log, key))},
            "examples": rows,
            "compute": str(model.dtype).removeprefix("torch."),
            "optimizer": optimizer_on(recipe.train.optimizer, model.device.type),
        },
        "environment": environment(model.device.type) | ({LIGER: installed(LIGER)} if uses_liger(model) else {}),
    }
    if run.start is not None:
        lineage["parents"] = [
            {
                "reference": str(run.start),
                "manifest_digest": run.start.manifest_digest,
                "content_digest": run.start.content_digest,
            }
        ]
    if scores:
        lineage["metrics"] = {recipe.task: entry(scores, run.test_digest)}
    if samples:
        lineage["samples"] = [sample.to_json(MAX_TEXT) for sample in samples]
    return lineage


def peak_memory_mb() -> float:
    """The most memory this process has held: on the GPU if there is one, else resident."""
    if torch.cuda.is_initialized():
        return round(torch.cuda.max_memory_allocated() / 1e6, 1)
    return round(
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6, 1
    )


def environment(device: str) -> dict[str, str]:
    """The versions that decide a result, by package."""
    gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    versions = {name: installed(name) for name in PACKAGES}
    with contextlib.suppress(PackageNotFoundError):  # run from a folder
        versions["adapterhub-local"] = installed("adapterhub-local")
    return {"python": platform.python_version(), "device": device, **gpu, **versions}
