"""The variants of LoRA a recipe may ask for: each trains, is written as PEFT reads it, and is what it says."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel

from adapterhub_local.base.add import add_base
from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.load import load_base
from adapterhub_local.cli.main import qhub
from adapterhub_local.errors import BadFile, BadRecipe, Incompatible, InputError
from adapterhub_local.evaluate.metrics import evaluate
from adapterhub_local.lora.adapter import open_adapter
from adapterhub_local.recipe import load_recipe
from adapterhub_local.rows.examples import read_chats, tokenise
from adapterhub_local.settings import Home
from adapterhub_local.train.adapter import factors_of, with_adapter
from adapterhub_local.train.train import train
from adapterhub_local.train.trainer import make_trainer
from adapterhub_local.train.watch import Watch
from tests.chats import write_recipe
from tests.tiny import save_tiny_model


def peft_loss(info: BaseInfo, folder: Path, data: Path) -> float:
    """The held-out loss with the adapter loaded by plain PEFT."""
    base = load_base(info)
    tests = tokenise(read_chats(data), base.tokenizer, 512)
    return evaluate(PeftModel.from_pretrained(base.model, str(folder)).eval(), tests, 1).loss


@pytest.mark.parametrize(
    "changes",
    [
        ["adapter.dora=true", "adapter.dtype=bfloat16"],
        ["adapter.init=eva"],
        ["adapter.rank_pattern={ q_proj = 2, 'mlp.*' = 6 }", "adapter.alpha_pattern={ q_proj = 3 }"],
        ["adapter.target_modules=attention", "adapter.rslora=true", "adapter.init=gaussian"],
        ["train.loraplus_ratio=4"],
        ["train.activation_checkpointing=true"],
    ],
    ids=" ".join,
)
def test_variants(tiny_base: BaseInfo, home: Home, tmp_path: Path, changes: list[str]) -> None:
    """The variant lowers the loss, and plain PEFT loads the version with exactly the loss the run measured."""
    path = write_recipe(tmp_path)
    version = train(load_recipe(path, changes), home)
    measured = version.lineage["metrics"]["yes-no"]

    assert measured["adapter"]["loss"] < measured["base"]["loss"]
    # DoRA's norms of rows are rounded to bfloat16 at other places when PEFT loads them: 3 digits
    tolerance = 1e-5 if "adapter.dtype=bfloat16" not in changes else 3e-3
    found = peft_loss(tiny_base, version.path, tmp_path / "test.jsonl")
    assert found == pytest.approx(measured["adapter"]["loss"], rel=tolerance)


def test_patterns_reach_their_modules(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """Ranks and alphas by pattern are those of the written factors; a pattern without a module is an error."""
    path = write_recipe(tmp_path)
    patterns = ["adapter.rank_pattern={ q_proj = 2 }", "adapter.alpha_pattern={ q_proj = 3, k_proj = 1 }"]
    adapter = open_adapter(train(load_recipe(path, patterns), home).path)
    ranks = {module.rpartition(".")[2]: shape.rank for module, shape in adapter.shapes.items()}
    scalings = {module.rpartition(".")[2]: delta.scaling for module, delta in adapter.deltas()}

    assert (ranks["q_proj"], ranks["k_proj"]) == (2, 4)
    assert (scalings["q_proj"], scalings["k_proj"], scalings["v_proj"]) == (3 / 2, 1 / 4, 8 / 4)
    with pytest.raises(InputError, match="'q_porj' is not the end of any module"):
        train(load_recipe(path, ["adapter.rank_pattern={ q_porj = 2 }"]), home)


def test_bfloat16_factors_but_float32_magnitudes(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """With bfloat16 factors DoRA's magnitudes stay in float32, where small steps do not vanish."""
    recipe = load_recipe(write_recipe(tmp_path), ["adapter.dora=true", "adapter.dtype=bfloat16"])
    factors = factors_of(with_adapter(load_base(tiny_base), recipe))
    dtypes = {name.rpartition("lora_")[2]: factor.dtype for name, factor in factors.items()}

    assert dtypes == {"A.weight": torch.bfloat16, "B.weight": torch.bfloat16, "magnitude_vector": torch.float32}


def test_eva_explains_the_inputs(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """EVA's A keeps more of a layer's inputs than a random A of the same rank, and begins with no change."""
    recipe = load_recipe(write_recipe(tmp_path), ["adapter.init=eva"])
    base = load_base(tiny_base)
    examples = tokenise(read_chats(recipe.data.train), base.tokenizer, 512)
    seen: list[torch.Tensor] = []
    layer = base.model.model.layers[1].mlp.down_proj
    handle = layer.register_forward_hook(lambda module, given, output: seen.append(given[0].flatten(0, -2)))
    with torch.no_grad():
        for example in examples:
            base.model(input_ids=torch.tensor([example.ids]))
    handle.remove()
    inputs = torch.cat(seen)
    model = with_adapter(base, recipe, examples=examples)
    A = next(factor for name, factor in factors_of(model).items() if "1.mlp.down_proj.lora_A" in name).detach()

    def kept(rows: torch.Tensor) -> float:
        directions = torch.linalg.qr(rows.T).Q
        return float((inputs @ directions).norm() / inputs.norm())

    assert A.shape[0] == 4
    assert kept(A) > 1.3 * kept(torch.randn(A.shape, generator=torch.Generator().manual_seed(0)))
    assert all(not factor.any() for name, factor in factors_of(model).items() if "lora_B" in name)


def test_loraplus_rates(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """LoRA+ gives every B, and only B, its multiple of A's learning rate."""
    recipe = load_recipe(write_recipe(tmp_path), ["train.loraplus_ratio=8"])
    base = load_base(tiny_base)
    examples = tokenise(read_chats(recipe.data.train), base.tokenizer, 512)
    model = with_adapter(base, recipe)
    trainer = make_trainer(model, examples, recipe, tmp_path / "run", Watch(lambda entry: None))
    rates = {id(factor): group["lr"] for group in trainer.create_optimizer().param_groups for factor in group["params"]}

    assert {rates[id(factor)] for name, factor in factors_of(model).items() if "lora_A" in name} == {0.01}
    assert {rates[id(factor)] for name, factor in factors_of(model).items() if "lora_B" in name} == {0.08}


@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "loftq"])
def test_what_moves_the_base_is_refused(tmp_path: Path, init: str) -> None:
    """Initialisations that change the base are refused with the reason; an unknown one with the known."""
    with pytest.raises(BadRecipe, match="starts from a changed base, which is shared"):
        load_recipe(write_recipe(tmp_path), [f"adapter.init={init}"])
    with pytest.raises(BadRecipe, match="must be one of default, gaussian, eva"):
        load_recipe(write_recipe(tmp_path), ["adapter.init=zeros"])


def test_train_on(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """`adapter.from` goes on from a version: its factors, shape and scaling; the lineage names it."""
    path = write_recipe(tmp_path)
    first = train(load_recipe(path, ["adapter.rank_pattern={ q_proj = 2 }", "output.alias=prod"]), home)
    still = train(load_recipe(path, ["adapter.from=yes-no@prod", "train.learning_rate=1e-9"]), home)
    on = train(load_recipe(path, ["adapter.from=yes-no@1", "output.name=more"]), home)
    scores = [version.lineage["metrics"]["yes-no"]["adapter"]["loss"] for version in (first, still)]

    assert open_adapter(still.path).config.rank_of("model.layers.0.self_attn.q_proj") == 2
    for (_, one), (_, other) in zip(open_adapter(first.path).deltas(), open_adapter(still.path).deltas(), strict=True):
        torch.testing.assert_close(one.A, other.A, rtol=0, atol=1e-6)
        torch.testing.assert_close(one.B, other.B, rtol=0, atol=1e-6)
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    assert on.lineage["metrics"]["more"]["adapter"]["loss"] < scores[0]
    assert [parent["reference"] for parent in on.lineage["parents"]] == ["yes-no@1"]
    assert on.lineage["adapter"]["rank"] == 4
    with pytest.raises(
        InputError, match=r"adapter\.rank = 7: yes-no@1 has 4, and continued training keeps it: leave rank out"
    ):
        train(load_recipe(path, ["adapter.from=yes-no@1", "adapter.rank=7"]), home)


def test_from_another_base(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """A version of another base, or one that does not exist, is refused before the base is loaded."""
    other = add_base("other", save_tiny_model(tmp_path / "other", seed=7), home)
    path = write_recipe(tmp_path)
    train(load_recipe(path, ["base.name=other"]), home)

    assert other.fingerprint != tiny_base.fingerprint
    with pytest.raises(Incompatible, match=r"adapter\.from = 'yes-no@1': yes-no@1 was made for another base"):
        train(load_recipe(path, ["adapter.from=yes-no@1"]), home)
    with pytest.raises(InputError, match="nothing"):
        train(load_recipe(path, ["adapter.from=nothing@1"]), home)
    with pytest.raises(BadRecipe, match=r"adapter\.from = 'a\*0\.5\+b'"):
        load_recipe(path, ["adapter.from=a*0.5+b"])


def test_dora_is_said_to_be_what_it_is(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """A DoRA version says so in its config, what takes deltas refuses it with the reason, and it is trained on."""
    path = write_recipe(tmp_path)
    version = train(load_recipe(path, ["adapter.dora=true"]), home)
    still = train(load_recipe(path, ["adapter.from=yes-no@1", "train.learning_rate=1e-9", "output.name=still"]), home)
    one, other = (open_adapter(made.path, dora=True) for made in (version, still))
    assert one.modules == other.modules
    for module in one.modules:
        torch.testing.assert_close(one.delta(module).B, other.delta(module).B, rtol=0, atol=1e-6)
        torch.testing.assert_close(one.magnitude(module), other.magnitude(module), rtol=0, atol=1e-6)
    config = json.loads((version.path / "adapter_config.json").read_bytes())

    assert config["use_dora"] is True
    assert version.lineage["adapter"]["dora"] is True
    with pytest.raises(BadFile, match=r"DoRA|lora_magnitude_vector"):
        open_adapter(version.path)
    done = CliRunner().invoke(qhub, ["fsck"])
    assert done.exit_code == 0, done.output
