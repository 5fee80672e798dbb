"""What a model is, as mypy is told: the libraries' own models have all of it."""

import inspect

import pytest
from peft import LoraConfig, get_peft_model

from adapterhub_local.base.experts import build_model
from adapterhub_local.base.model import AdaptedModel, BaseModel, as_module, inner_model
from tests.tiny import llama_config


def asked_of(kind: type) -> set[str]:
    """The public names that a protocol has, its parents' included."""
    named = {name for part in kind.__mro__[:-1] for name in (*vars(part), *inspect.get_annotations(part))}
    return {name for name in named if not name.startswith("_")}


@pytest.mark.parametrize("kind", [BaseModel, AdaptedModel])
def test_models_have_all_that_is_asked_of_them(kind: type) -> None:
    """Every name of the protocol is an attribute of the model that stands for it, so that none outlives its library."""
    model = build_model(llama_config())
    if kind is AdaptedModel:
        model = get_peft_model(as_module(model), LoraConfig(r=2, target_modules=["q_proj"]))
    assert len(asked_of(kind)) > 15
    assert not [name for name in sorted(asked_of(kind)) if not hasattr(model, name)]
    assert inner_model(model).base_model is as_module(inner_model(model)).model
