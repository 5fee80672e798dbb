"""Every architecture that is promised: quantised as a base, packed exactly, trained, and loaded by plain PEFT."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from adapterhub_local.base.add import add_base
from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import LoadedBase, load_base
from adapterhub_local.evaluate.evaluate import score
from adapterhub_local.evaluate.written import write_ids
from adapterhub_local.recipe import load_recipe
from adapterhub_local.rows.attention import is_attached
from adapterhub_local.rows.examples import Example, read_chats, tokenise
from adapterhub_local.rows.packing import forward, is_exact, pack
from adapterhub_local.settings import Home
from adapterhub_local.train.adapter import with_adapter
from adapterhub_local.train.loss import answer_loss, output_head
from adapterhub_local.train.objectives import make_objective
from adapterhub_local.train.targets import target_names
from adapterhub_local.train.train import train
from tests.architectures import SHAPES, WINDOW, save_architecture
from tests.chats import write_recipe

NAMES = list(SHAPES)
# the ends of the linear layers of attention and of the MLP, as each architecture calls them
SPLIT = (["k_proj", "o_proj", "q_proj", "v_proj"], ["down_proj", "gate_proj", "up_proj"])
DENSE = (["dense", "query_key_value"], ["dense_4h_to_h", "dense_h_to_4h"])
FUSED = (["o_proj", "qkv_proj"], ["down_proj", "gate_up_proj"])
GROUPS = {
    "falcon": DENSE,
    "falcon-new": DENSE,
    "gpt-neox": DENSE,
    "phi3": FUSED,
    "mixtral": (SPLIT[0], ["w1", "w2", "w3"]),
    "qwen2-moe": (SPLIT[0], ["down_proj", "gate_proj", "shared_expert_gate", "up_proj"]),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of an architecture as the base `tiny`, which is quantised once for all tests."""

    @cache
    def build(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        return add_base("tiny", save_architecture(name, folder / "model"), Home(folder / "home")).folder

    return build


@pytest.fixture
def base(request: pytest.FixtureRequest, built: Callable[[str], Path], home: Home) -> LoadedBase:
    """The architecture of the test's parameter as the base `tiny` in this test's home."""
    shutil.copytree(built(request.param), home.bases / "tiny")
    return load_base(read_record(home.bases / "tiny"))


@pytest.mark.parametrize("base", NAMES, indirect=True)
def test_answers_behind_a_prompt_computed_once(base: LoadedBase, tmp_path: Path) -> None:
    """GRPO copies a prompt's cache for all answers that it draws: attention windows and rotations stay right."""
    changes = ["train.objective=grpo", "reward.length=5", "reward.max_tokens=6"]
    recipe = load_recipe(write_recipe(tmp_path), changes)
    examples = tokenise(read_chats(recipe.data.train, 4), base.tokenizer, 512)
    goal = make_objective(with_adapter(base, recipe), examples, recipe, tokenizer=base.tokenizer, info=base.info)
    prompts = [example.ids[: example.spans[-1][0]] for example in examples]
    alone = [goal._generate([prompt], 1, is_drawn=False)[0] for prompt in prompts]
    twice = goal._generate(prompts, 2, is_drawn=False)
    assert twice[::2] == twice[1::2] == alone
    assert len({len(prompt) for prompt in prompts}) > 1, "prompts of one length would hide the padding"


@pytest.mark.parametrize("base", NAMES, indirect=True)
def test_answers_behind_a_shared_beginning(base: LoadedBase) -> None:
    """What all prompts begin with is computed once where layers see all of it; the answers are those of each alone."""
    beginning = tuple(range(10, 10 + WINDOW + 5))
    rests = [(60, 61, 62), (63,), (70, 71, 72, 73, 74, 75), (60, 62)]
    examples = [
        Example((*beginning, *rest, 5), ((len(beginning) + len(rest), len(beginning) + len(rest) + 1),))
        for rest in rests
    ]
    alone = [write_ids(base.model, base.tokenizer, [example], 6, 1)[0] for example in examples]
    assert write_ids(base.model, base.tokenizer, examples, 6, 3) == alone
    assert len(set(map(tuple, alone))) > 1, "answers that do not depend on the prompt would hide a mistake"


@pytest.mark.parametrize(
    ("base", "share"),
    [*((name, True) for name in NAMES), *((name, False) for name in ("llama", "falcon", "gemma2"))],
    indirect=["base"],
)
def test_packing_is_exact(base: LoadedBase, share: bool, tmp_path: Path) -> None:
    """Packed examples have the loss and gradients of each alone, attention windows and soft caps included."""
    recipe = load_recipe(write_recipe(tmp_path))
    examples = tokenise(read_chats(recipe.data.train, 4), base.tokenizer, 512)
    assert min(len(example.ids) for example in examples) > WINDOW
    model = with_adapter(base, recipe)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def loss_and_gradients(groups: list) -> tuple[float, list[torch.Tensor]]:
        total = torch.zeros(())
        for group in groups:
            logits, targets, _ = forward(model, pack(group, share=share))
            total = total + cross_entropy(logits, targets, reduction="sum")
        # an expert that no token was routed to has no part in the loss
        return total.item(), list(torch.autograd.grad(total, factors, materialize_grads=True))

    loss, gradients = loss_and_gradients([[example] for example in examples])
    assert is_exact(model, examples, share=share)
    packed_loss, packed_gradients = loss_and_gradients([examples])
    scale = torch.stack([gradient.norm() for gradient in gradients]).norm()

    assert is_attached(model) != (base.model.config.model_type == "falcon")  # which takes masks
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    assert all((ours - theirs).norm() < 1e-5 * scale for ours, theirs in zip(packed_gradients, gradients, strict=True))


@pytest.mark.parametrize("base", ["llama", "gemma2"], indirect=True)
def test_the_loss_in_chunks(base: LoadedBase, tmp_path: Path) -> None:
    """Cross-entropy over a few tokens at a time has the loss and gradients of all at once, soft caps included."""
    recipe = load_recipe(write_recipe(tmp_path))
    examples = tokenise(read_chats(recipe.data.train, 3), base.tokenizer, 512)
    base.model.config.final_logit_softcapping = getattr(base.model.config, "final_logit_softcapping", None)
    model = with_adapter(base, recipe)
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    head = output_head(model, examples[0])
    assert head is not None
    packed = pack(examples)
    three_tokens = 3 * 4 * base.model.config.vocab_size
    whole, chunked = answer_loss(model, packed, None), answer_loss(model, packed, head, three_tokens)

    assert packed.num_labels > 6
    assert chunked.item() == pytest.approx(whole.item(), rel=1e-6)
    for one, other in zip(torch.autograd.grad(whole, factors), torch.autograd.grad(chunked, factors), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_head_that_is_not_understood_is_not_used(tiny_base, tmp_path: Path) -> None:
    """Where logits are more than the head's product, the model's own code computes them."""
    recipe = load_recipe(write_recipe(tmp_path))
    base = load_base(tiny_base)
    (example,) = tokenise(read_chats(recipe.data.train, 1), base.tokenizer, 512)
    assert output_head(base.model, example) is not None
    base.model.register_forward_hook(lambda module, given, output: output.__setitem__("logits", output.logits * 2))

    assert output_head(base.model, example) is None


@pytest.mark.parametrize("base", NAMES, indirect=True)
def test_train_and_load_with_peft(base: LoadedBase, home: Home, tmp_path: Path, request) -> None:
    """Training lowers the loss, and plain PEFT loads the version: it scores exactly what the run measured."""
    recipe = load_recipe(write_recipe(tmp_path, count=8))
    version = train(recipe, home)
    measured = version.lineage["metrics"]["yes-no"]
    tests = tokenise(read_chats(recipe.data.test), base.tokenizer, 512)

    assert measured["adapter"]["loss"] < measured["base"]["loss"]
    assert score(base, version, tests, 16).loss == pytest.approx(measured["adapter"]["loss"], rel=1e-5)
    groups = GROUPS.get(request.node.callspec.params["base"], SPLIT)
    assert tuple(target_names(base.model, group) for group in ("attention", "mlp")) == groups
