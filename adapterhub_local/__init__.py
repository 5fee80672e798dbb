"""adapterhub-local: many LoRA adapters over one shared 4-bit base model.

from adapterhub_local import Registry, merge_adapters, train_recipe
train_recipe("recipes/sentiment.toml")                                     # sentiment@1
merge_adapters(["sentiment@1", "origin@1"], [0.7, 0.3], name="both")       # both@1
Registry().resolve("sentiment@prod").path                                  # a folder that plain PEFT loads

Importing this loads no torch: a name is loaded when it is first asked for. Functions are in `adapterhub_local.api`.
"""

from typing import TYPE_CHECKING, Any

from adapterhub_local.lazy import load as _load

if TYPE_CHECKING:
    from adapterhub_local.api import (
        create_app,
        evaluate_adapters,
        merge_adapters,
        pull_adapter,
        push_adapter,
        train_recipe,
    )
    from adapterhub_local.errors import QhubError
    from adapterhub_local.recipe import Recipe, load_recipe
    from adapterhub_local.refs import Mix, Reference
    from adapterhub_local.registry import Registry, Version

__all__ = [
    "Mix",
    "QhubError",
    "Recipe",
    "Reference",
    "Registry",
    "Version",
    "create_app",
    "evaluate_adapters",
    "load_recipe",
    "merge_adapters",
    "pull_adapter",
    "push_adapter",
    "train_recipe",
]

_HOMES = {
    **dict.fromkeys(
        ("create_app", "evaluate_adapters", "merge_adapters", "pull_adapter", "push_adapter", "train_recipe"),
        "adapterhub_local.api",
    ),
    "Mix": "adapterhub_local.refs",
    "QhubError": "adapterhub_local.errors",
    "Recipe": "adapterhub_local.recipe",
    "Reference": "adapterhub_local.refs",
    "Registry": "adapterhub_local.registry",
    "Version": "adapterhub_local.registry",
    "load_recipe": "adapterhub_local.recipe",
}


def __getattr__(name: str) -> Any:
    return _load(__name__, _HOMES, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
