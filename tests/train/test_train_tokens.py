"""Tokens that are trained with an adapter: their rows are PEFT's, the base stays as it is, and mistakes are named."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from adapterhub_local.base.add import add_base
from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.load import load_base
from adapterhub_local.cli.main import run
from adapterhub_local.errors import Stopped
from adapterhub_local.evaluate.evaluate import adapted
from adapterhub_local.evaluate.metrics import evaluate
from adapterhub_local.lora.adapter import open_adapter
from adapterhub_local.recipe import load_recipe
from adapterhub_local.registry import Registry
from adapterhub_local.rows.examples import read_chats, tokenise
from adapterhub_local.rows.token_rows import use_token_rows
from adapterhub_local.settings import Home
from adapterhub_local.train.adapter import factors_of, with_adapter
from adapterhub_local.train.checkpointing import enable_checkpointing, move_embeddings
from adapterhub_local.train.tokens import ids_of
from adapterhub_local.train.train import train
from adapterhub_local.train.trainer import make_trainer
from adapterhub_local.train.watch import Watch
from tests.chats import RECIPE, write_recipe
from tests.tiny import byte_tokenizer, llama_config, save_tiny_model
from tests.train.test_grpo import drawing
from tests.train.test_objectives import recipe_of, rows_of
from tests.train.test_train_runs import stop_at

EMBEDDINGS = "model.embed_tokens"
TOKENS = "adapter.train_tokens=['a', '<|im_start|>']"  # ids 64 and 257
IDS = torch.tensor([[64, 65, 257, 64, 3, 200]])


@pytest.fixture
def tied_base(home: Home, tmp_path: Path) -> BaseInfo:
    """The base `tiny`, whose head is its embeddings."""
    return add_base("tiny", save_tiny_model(tmp_path / "tied", tie_word_embeddings=True), home)


@pytest.fixture(params=["tied", "untied"])
def base(request: pytest.FixtureRequest) -> BaseInfo:
    """The base `tiny`, of both kinds."""
    found: BaseInfo = request.getfixturevalue("tied_base" if request.param == "tied" else "tiny_base")
    return found


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits[0].float()


@pytest.mark.parametrize("changes", [[], ["train.activation_checkpointing=true", "adapter.dtype=bfloat16"]], ids=str)
def test_what_is_trained_is_what_peft_loads(
    base: BaseInfo, home: Home, tmp_path: Path, changes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The version has the two rows, PEFT's loss is the measured one, and the base has its own rows afterwards."""
    version = train(load_recipe(write_recipe(tmp_path), [TOKENS, *changes]), home)
    adapter = open_adapter(version.path, tokens=True)
    loaded = load_base(base)
    before, weight = logits(loaded.model), loaded.model.get_input_embeddings().weight.clone()
    tests = tokenise(read_chats(tmp_path / "test.jsonl"), loaded.tokenizer, 512)
    with adapted(loaded, version.path) as model:
        ours = logits(model)
    peft = PeftModel.from_pretrained(load_base(base).model, version.path).eval()
    moved = (adapter.rows(EMBEDDINGS) - weight[[64, 257]].float()).norm(dim=1)
    fields = json.loads((version.path / "adapter_config.json").read_text())

    assert (adapter.token_ids, list(adapter.tokens)) == ((64, 257), [EMBEDDINGS])
    assert (moved > 1e-3).all()
    assert adapter.rows(EMBEDDINGS).dtype == torch.float32
    torch.testing.assert_close(ours, logits(peft), atol=1e-4, rtol=1e-4)
    assert evaluate(peft, tests, 1).loss == pytest.approx(version.lineage["metrics"]["yes-no"]["adapter"]["loss"])
    assert version.lineage["adapter"]["tokens"] == 2
    assert version.lineage["adapter"]["num_parameters"] == adapter.num_parameters
    assert fields["trainable_token_indices"] == {EMBEDDINGS: [64, 257]}
    with pytest.raises(SystemExit, match="0"):
        run(["show", "yes-no"])
    assert f"{adapter.num_parameters:,} parameters, rows of 2 tokens" in capsys.readouterr().out
    assert torch.equal(logits(loaded.model), before)
    assert torch.equal(loaded.model.get_input_embeddings().weight, weight)
    assert version.base_fingerprint == base.fingerprint


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "indices", [[65, 3, 257], {"embed_tokens": [65, 3]}, {"embed_tokens": [65], "lm_head": [3, 65]}]
)
def test_value_and_gradient_are_pefts(tied: bool, indices) -> None:
    """Without a copy of the matrix, logits and the gradients of rows and factors are those of PEFT's own layers."""
    from transformers import LlamaForCausalLM

    found = []
    for is_ours in (False, True):
        torch.manual_seed(0)
        model = LlamaForCausalLM(llama_config(tie_word_embeddings=tied))
        settings = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=indices, init_lora_weights=False)
        peft = get_peft_model(model, settings)
        for name, parameter in peft.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.data += 0.1
        if is_ours:
            assert use_token_rows(peft) == 2 if tied or "lm_head" in indices else 1
        given = peft(input_ids=IDS).logits
        (given * torch.linspace(-1, 1, given.numel()).view_as(given)).sum().backward()
        gradients = {name: each.grad for name, each in peft.named_parameters() if each.requires_grad}
        found.append({"logits": given.detach(), **gradients})
        with peft.disable_adapter():
            found[-1]["off"] = peft(input_ids=IDS).logits.detach()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=2e-4, rtol=1e-4, msg=lambda text: f"{name}: {text}")  # noqa: B023
    assert (found[0]["logits"] - found[0]["off"]).abs().max() > 0.1


@pytest.mark.parametrize("objective", ["dpo", "kto", "orpo"])
def test_other_objectives(tied_base: BaseInfo, home: Home, tmp_path: Path, objective: str) -> None:
    """Preferences train rows as answers do; the reference that they are held against has the base's own."""
    recipe = recipe_of(tmp_path, rows_of(objective), TOKENS, objective=objective)
    version = train(recipe, home)
    assert open_adapter(version.path, tokens=True).token_ids == (64, 257)
    assert len(version.lineage["training"]["curve"]) == version.lineage["training"]["steps"]


def test_drawn_answers(tied_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """GRPO draws with the rows, and trains them; a token may be in no prompt."""
    version = train(drawing(tmp_path, "adapter.train_tokens=['z']", "train.max_steps=3"), home)
    assert any("rows of the embeddings" in note for note in version.lineage["notes"])  # so transformers draws
    weight = load_base(tied_base).model.get_input_embeddings().weight[[89]].float()
    assert not torch.equal(open_adapter(version.path, tokens=True).rows(EMBEDDINGS), weight)


def test_resumed_and_trained_on(
    tied_base: BaseInfo, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was stopped ends with the same rows; a version trained on from begins with its rows."""
    path = write_recipe(tmp_path)
    recipe = load_recipe(path, [TOKENS, "train.epochs=3", "train.save_every=2", "train.eval_every=2"])
    whole = train(recipe, home)
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(Stopped):
            train(recipe, home)
    assert train(recipe, home, resume=True).content_digest == whole.content_digest

    onward = load_recipe(path, [f"adapter.from={whole}"])
    begun = factors_of(with_adapter(load_base(tied_base), onward, start=whole))
    after = open_adapter(train(onward, home).path, tokens=True)
    rows = next(factor for name, factor in begun.items() if "token_adapter" in name)
    assert torch.equal(rows.detach(), open_adapter(whole.path, tokens=True).rows(EMBEDDINGS))
    assert after.token_ids == (64, 257)
    assert not torch.equal(after.rows(EMBEDDINGS), rows.detach())


def test_blocks_that_are_computed_again_give_the_same_rows(base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """The gradient of the rows comes through every block, kept or computed again, to the bit."""
    path = write_recipe(tmp_path)
    plain = train(load_recipe(path, [TOKENS, "train.max_steps=2"]), home)
    again = train(load_recipe(path, [TOKENS, "train.max_steps=2", "train.activation_checkpointing=true"]), home)
    assert plain.content_digest == again.content_digest


def test_rows_do_not_decay(tied_base: BaseInfo, tmp_path: Path) -> None:
    """Weight decay applies to A and B only, since it would pull rows towards zero rather than the base; LoRA+ too."""
    for ratio in ((), ("train.loraplus_ratio=4",)):
        recipe = load_recipe(write_recipe(tmp_path), [TOKENS, "train.weight_decay=0.5", *ratio])
        base = load_base(tied_base)
        model = with_adapter(base, recipe)
        examples = tokenise(read_chats(recipe.data.train), base.tokenizer, 512)
        trainer = make_trainer(model, examples, recipe, tmp_path / "run", Watch(lambda entry: None))
        groups = {id(each): group for group in trainer.create_optimizer().param_groups for each in group["params"]}
        decays = {name: groups[id(factor)]["weight_decay"] for name, factor in factors_of(model).items()}
        assert {value for name, value in decays.items() if "token_adapter" in name} == {0.0}
        assert {value for name, value in decays.items() if "lora_" in name} == {0.5}


def test_rows_beside_embeddings_in_host_memory(tiny_base: BaseInfo, tmp_path: Path) -> None:
    """With offloading the base's table lies on the host, and the adapter's rows are looked up as before."""
    recipe = load_recipe(write_recipe(tmp_path), [TOKENS])
    model = with_adapter(load_base(tiny_base), recipe)
    factors_of(model)[f"base_model.model.{EMBEDDINGS}.token_adapter.trainable_tokens_delta"].data += 1
    before = logits(model)
    move_embeddings(model)
    layer = model.get_base_model().get_input_embeddings().token_adapter.base_layer
    assert type(layer).__name__ == "HostEmbedding"
    assert torch.equal(logits(model), before)
    enable_checkpointing(model.train(), True)
    model(input_ids=IDS).logits.sum().backward()
    assert all(factor.grad is not None for factor in factors_of(model).values())


MISTAKES = {
    "['ab']": "'ab' is 2 tokens of base 'tiny', not one: .*keeps no tokens in reserve.*61 rows .* belong to no token",
    "['<|tool|>']": "'<|tool|>' is 8 tokens of base 'tiny'",
    "['a', 'a']": "names 'a' twice",
    "['Ġ', ' ']": "' ' and 'Ġ' are the same token",
    "[]": "must name at least one token",
    "[5]": "adapter.train_tokens must be a list of non-empty texts",
    "'a'": "adapter.train_tokens must be a list of non-empty texts",
    "['']": "adapter.train_tokens must be a list of non-empty texts",
    "['%']": "no example has '%' as a token",
    "['a']\ninit = 'eva'": "train_tokens cannot begin with init = 'eva': use default or gaussian",
    "['a', '%', '#']": "no example has '%' as a token .nor 1 others",
}


@pytest.mark.parametrize("given", MISTAKES)
def test_a_mistake_is_one_sentence(
    tiny_base: BaseInfo, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str
) -> None:
    """Whatever tokens cannot be trained are named before anything is written, with exit code 2."""
    write_recipe(tmp_path, RECIPE.replace("[adapter]\n", f"[adapter]\ntrain_tokens = {given}\n"))
    with pytest.raises(SystemExit) as ended:
        run(["train", str(tmp_path / "recipe.toml")])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert re.search(MISTAKES[given].replace("|", r"\|"), told), told
    assert "recipe.toml" in told
    assert "Traceback" not in told
    assert Registry(Home(tmp_path / "home")).versions("yes-no") == []


def test_reserved_tokens_are_named() -> None:
    """The error suggests the tokens that the base reserves for such use."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|reserved_special_token_{i}|>" for i in range(6)]})
    with pytest.raises(Exception, match=r"keeps for such use.*'<\|reserved_special_token_0\|>', .* and 2 more"):
        ids_of(["<tool>"], tokenizer, 320, "b")
    with pytest.raises(Exception, match=r"has no row in the embeddings of base 'b' \(260\)"):
        ids_of(["<|reserved_special_token_5|>"], tokenizer, 260, "b")
    assert ids_of(["<|reserved_special_token_1|>", " ", "a"], tokenizer, 320, "b") == {
        "<|reserved_special_token_1|>": 260, " ": 220, "a": 64,
    }  # fmt: skip
