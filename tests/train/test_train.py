"""Training: the right tokens are learned, packing is exact, a recipe gives one adapter, a stopped run goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.load import load_base
from adapterhub_local.cli.main import run
from adapterhub_local.errors import BadData, InputError, InUse, NotFound
from adapterhub_local.lora.adapter import open_adapter
from adapterhub_local.recipe import load_recipe
from adapterhub_local.recipe.derived import num_steps
from adapterhub_local.registry import Registry
from adapterhub_local.rows.examples import Example, read_chats, tokenise
from adapterhub_local.rows.packing import common_prefix, forward, is_exact, pack, pack_rows
from adapterhub_local.settings import Home
from adapterhub_local.train.adapter import with_adapter
from adapterhub_local.train.train import train
from adapterhub_local.train.trainer import make_trainer
from adapterhub_local.train.watch import Watch
from tests.chats import chat, write_chats, write_recipe
from tests.patience import PATIENCE
from tests.tiny import VOCABULARY, byte_tokenizer


def examples_of(folder: Path, count: int = 6) -> list[Example]:
    path = write_chats(folder / "data.jsonl", count)
    return tokenise(read_chats(path), byte_tokenizer(), 512)


# -- data ------------------------------------------------------------------------------------------


def test_only_answers_are_learned(tmp_path: Path) -> None:
    """Of each assistant turn the text and the end-of-turn token are learned, of everything else nothing."""
    rows = {"messages": [*chat("one?", "first")["messages"], *chat("two?", "second")["messages"]]}
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(rows))
    tokenizer = byte_tokenizer()
    (example,) = tokenise(read_chats(path), tokenizer, 512)
    learned = [tokenizer.decode(example.ids[start:end]) for start, end in example.spans]

    assert learned == ["first<|im_end|>", "second<|im_end|>"]
    assert example.num_labels == len("first") + len("second") + 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "2: not JSON"),
        ("[" * 100_000, "2: not JSON: nested too deeply"),
        ("[]", "2: an example must be a table"),
        ('{"messages": []}', '2: write {"messages"'),
        ('{"messages": [{"role": "user"}]}', "2: every message needs"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "2: role 'robot'"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "2: the last message is the user's"),
        (json.dumps(chat("x", " ")), "2: the answer is empty"),
    ],
)  # fmt: skip
def test_bad_lines(tmp_path: Path, line: str, message: str) -> None:
    """A line that cannot be learned from is an error with its number."""
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(chat("a", "b")) + "\n" + line + "\n")
    with pytest.raises(BadData, match="data.jsonl:" + message.replace("[", r"\[").replace("{", r"\{")):
        read_chats(path)


def test_empty_and_foreign_files(tmp_path: Path) -> None:
    """An empty file and one that is not text are errors."""
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(BadData, match="no examples"):
        read_chats(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfa")
    with pytest.raises(BadData, match="not UTF-8"):
        read_chats(tmp_path / "binary.jsonl")


def test_too_long_and_no_template(tmp_path: Path) -> None:
    """A too long example is named, a base without chat template is refused."""
    path = write_chats(tmp_path / "data.jsonl", 3)
    with pytest.raises(BadData, match=r"data.jsonl:1 has \d+ tokens"):
        tokenise(read_chats(path), byte_tokenizer(), 20)
    with pytest.raises(InputError, match="no chat template"):
        tokenise(read_chats(path), byte_tokenizer(None), 512)


# -- packing ---------------------------------------------------------------------------------------


def test_packing_is_exact(tiny_base: BaseInfo, tmp_path: Path) -> None:
    """Packed examples behind a shared prefix have the loss and the gradients of each example alone."""
    examples = examples_of(tmp_path)
    model = with_adapter(load_base(tiny_base), load_recipe(write_recipe(tmp_path)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def loss_and_gradients(groups: list[list[Example]]) -> tuple[float, list[torch.Tensor]]:
        losses = []
        for group in groups:
            logits, targets, _ = forward(model, pack(group))
            losses.append(cross_entropy(logits, targets, reduction="sum"))
        total = torch.stack(losses).sum()
        return total.item(), list(torch.autograd.grad(total, factors))

    loss, gradients = loss_and_gradients([[example] for example in examples])
    assert is_exact(model, examples)
    packed_loss, packed_gradients = loss_and_gradients([examples])
    scale = torch.stack([gradient.norm() for gradient in gradients]).norm()

    assert common_prefix(examples) > 20
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    assert all((ours - theirs).norm() < 1e-5 * scale for ours, theirs in zip(packed_gradients, gradients, strict=True))


def test_a_prefix_never_covers_a_label(tmp_path: Path) -> None:
    """Equal examples share no more than the tokens before the one that predicts the first label."""
    example = examples_of(tmp_path, 1)[0]

    assert common_prefix([example, example]) == example.spans[0][0] - 1
    assert (pack([example, example]).labels != -100).sum() == 2 * example.num_labels


def test_models_that_cannot_be_packed_are_found(tmp_path: Path, tiny_base: BaseInfo) -> None:
    """The probe accepts what honours mask and positions, and refuses what ignores them."""
    examples = examples_of(tmp_path)
    shape = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    torch.manual_seed(0)
    deaf = MistralForCausalLM(MistralConfig(**shape, **heads)).eval()
    deaf.model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "attention_mask": None, "position_ids": None}), with_kwargs=True
    )
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=512))

    assert is_exact(load_base(tiny_base).model, examples)
    assert is_exact(gpt2.eval(), examples)
    assert not is_exact(deaf, examples)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=20), st.integers(1, 120), st.integers(1, 20), st.booleans())
def test_rows(lengths: list[int], max_tokens: int, max_examples: int, share: bool) -> None:
    """Rows hold every example once, in order, within both limits unless one example alone is longer."""
    examples = [Example((7,) * 5 + (number,) * length, ((6, 5 + length),)) for number, length in enumerate(lengths, 9)]
    rows = pack_rows(examples, max_tokens, max_examples, share=share)
    order = {id(example): number for number, example in enumerate(examples)}
    numbers = [[order[id(example)] for example in row] for row in rows]

    assert sorted(number for row in numbers for number in row) == list(range(len(examples)))
    assert all(row == sorted(row) and len(row) <= max_examples for row in numbers)
    for row in rows:
        assert len(row) == 1 or len(pack(row, share=share).labels[0]) <= max_tokens


def test_rows_are_full() -> None:
    """Best-fit decreasing fills rows that a cut in the order of the batch would leave half empty."""
    examples = [Example((number,) * length, ((1, 2),)) for number, length in enumerate((60, 70, 40, 30, 50, 50))]

    assert [[len(example.ids) for example in row] for row in pack_rows(examples, 100, 6)] == [
        [60, 40],
        [70, 30],
        [50, 50],
    ]


def test_split_into_micro_batches_changes_nothing(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """Loss and gradient norm of a step are the same however the batch is cut into forward passes."""
    logs = []
    for size in (8, 4, 1):
        recipe = load_recipe(write_recipe(tmp_path), [f"train.micro_batch_size={size}", "train.epochs=1"])
        log: list[dict] = []
        model = with_adapter(load_base(tiny_base), recipe)
        trainer = make_trainer(model, examples_of(tmp_path, 16), recipe, tmp_path / "run", Watch(log.append))
        trainer.train()
        logs.append([value for entry in log for value in (entry["loss"], entry["grad_norm"])])

    assert logs[1] == pytest.approx(logs[0], rel=1e-5)
    assert logs[2] == pytest.approx(logs[0], rel=1e-5)


# -- runs ------------------------------------------------------------------------------------------


def test_a_run(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """A run registers a version that says where it comes from; the same recipe again gives the same content."""
    recipe = load_recipe(write_recipe(tmp_path), ["output.alias=prod"])
    first, second = train(recipe, home), train(recipe, home)
    lineage = first.lineage
    scores = lineage["metrics"]["yes-no"]

    assert (str(first), str(second)) == ("yes-no@1", "yes-no@2")
    assert first.content_digest == second.content_digest
    assert first.manifest_digest != second.manifest_digest
    assert str(Registry(home).resolve("yes-no@prod")) == "yes-no@2"
    assert lineage["base"]["fingerprint"] == tiny_base.fingerprint
    assert [(entry["role"], entry["rows"]) for entry in lineage["data"]] == [("train", 16), ("test", 6)]
    assert lineage["recipe"]["text"] == recipe.text
    assert lineage["environment"]["torch"] == version("torch")
    assert scores["adapter"]["loss"] < scores["base"]["loss"]
    for who in ("adapter", "base"):
        low, high = scores[who]["intervals"]["exact_match"]
        assert low <= scores[who]["exact_match"] <= high
    assert scores["base"]["difference"]["loss"]["value"] < 0
    assert not list(home.tmp.iterdir())
    assert str(home.root) not in json.dumps(lineage)
    assert str(tmp_path) not in json.dumps(lineage)


def test_another_seed_gives_another_adapter(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """The seed decides the result."""
    path = write_recipe(tmp_path)
    digests = {train(load_recipe(path, [f"train.seed={seed}"]), home).content_digest for seed in (0, 1)}

    assert len(digests) == 2


def test_plain_peft_loads_the_result(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """Plain PEFT, given the base, loads every factor of the version; its logits move by the deltas we read."""
    version = train(load_recipe(write_recipe(tmp_path)), home)
    base = load_base(tiny_base)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = base.model(input_ids=ids).logits
        model = PeftModel.from_pretrained(base.model, str(version.path)).eval()
        after = model(input_ids=ids).logits
    ours = open_adapter(version.path)
    theirs = {name for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}

    assert not torch.allclose(before, after)
    assert {f"base_model.model.{module}" for module in ours.modules} == theirs
    for module, delta in ours.deltas():
        wanted = model.get_submodule(f"base_model.model.{module}").get_delta_weight("default")
        assert torch.allclose(delta.dense(), wanted, atol=1e-6)


def test_rslora_dropout_and_chosen_modules(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """The adapter table is honoured: scaling, dropout, and only the modules named."""
    changes = ["adapter.rslora=true", "adapter.dropout=0.1", 'adapter.target_modules=["q_proj", "v_proj"]']
    adapter = open_adapter(train(load_recipe(write_recipe(tmp_path), changes), home).path)

    assert {module.rpartition(".")[2] for module in adapter.modules} == {"q_proj", "v_proj"}
    assert {delta.scaling for _, delta in adapter.deltas()} == {8 / 4**0.5}


@pytest.mark.parametrize(
    ("optimizer", "schedule"), [("adamw", "linear"), ("adamw_8bit", "constant"), ("paged_adamw_32bit", "linear")]
)
def test_optimizers_and_schedules(
    tiny_base: BaseInfo, home: Home, tmp_path: Path, optimizer: str, schedule: str
) -> None:
    """Every optimizer and schedule a recipe may name trains."""
    changes = [f"train.optimizer={optimizer}", f"train.schedule={schedule}", "train.compute=bfloat16"]
    scores = train(load_recipe(write_recipe(tmp_path), changes), home).lineage["metrics"]["yes-no"]

    assert scores["adapter"]["loss"] < scores["base"]["loss"]


def test_a_module_that_matches_nothing(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """Target modules the base does not have are an error that names them; nothing is registered."""
    with pytest.raises(InputError, match="q_porj"):
        train(load_recipe(write_recipe(tmp_path), ['adapter.target_modules=["q_porj"]']), home)

    assert Registry(home).versions() == []


def test_steps() -> None:
    """Steps are batches times epochs, a last small batch included."""
    recipe = type("Train", (), {"batch_size": 16, "epochs": 1.0, "max_steps": None})
    assert num_steps(640, recipe) == 40
    assert num_steps(641, recipe) == 41
    assert num_steps(3, type("Train", (), {"batch_size": 16, "epochs": 0.1, "max_steps": None})) == 1


# `qhub` with steps so slow that a signal after the first of them finds the run not at its end
SLOW = """
import time
from adapterhub_local.cli.main import run
from adapterhub_local.train.watch import Watch
end = Watch.on_step_end
Watch.on_step_end = lambda *given, **named: time.sleep(1) or end(*given, **named)
run()
"""


def test_stop_and_go_on(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """SIGTERM keeps the state and says how to go on; going on gives the very adapter of an undisturbed run.

    Ctrl-C is the same handler: tests/train/test_sweep.py.
    """
    path = str(write_recipe(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "train", path, "--set", "train.epochs=6"], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        logs = list(home.runs.glob("*/log.jsonl")) if home.runs.is_dir() else []
        if logs and logs[0].stat().st_size:
            break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=120)

    assert process.returncode == 130, errors
    assert "--resume" in errors
    assert "Traceback" not in errors
    assert Registry(home).versions() == []

    recipe = load_recipe(Path(path), ["train.epochs=6"])
    with pytest.raises(InUse, match="--restart"):
        train(recipe, home)
    resumed = train(recipe, home, resume=True)
    assert resumed.content_digest == train(recipe, home).content_digest
    with pytest.raises(NotFound, match="no stopped run"):
        train(recipe, home, resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--set", "base.name=absent"], "there is no base 'absent'"),
        (["--set", "data.train=absent.jsonl"], "there is no file"),
        (["--set", "adapter.rnak=3"], "unknown key 'rnak' in [adapter]: did you mean 'rank'?"),
        (["--set", "data.max_length=9"], "at most 9 are read"),
        (["--resume", "--restart"], "exclude each other"),
        (["--resume"], "no stopped run"),
    ],
)
def test_bad_input(
    tiny_base: BaseInfo, home: Home, tmp_path: Path, capfd: pytest.CaptureFixture[str], changes: list[str], message: str
) -> None:
    """A mistake is one line on standard error with exit code 2, and leaves nothing behind."""
    before = sorted(home.root.rglob("*"))
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        run(["train", str(write_recipe(tmp_path)), *changes])
    output, errors = capfd.readouterr()

    assert exit_info.value.code == 2
    assert output == ""
    (line,) = [line for line in errors.splitlines() if line.startswith("qhub: ")]  # behind what it noted until then
    assert message in line
    assert sorted(home.root.rglob("*")) == before
