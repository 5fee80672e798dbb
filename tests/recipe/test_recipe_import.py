"""Settings of axolotl, LLaMA-Factory, TRL, PEFT and Unsloth as recipes: what is taken over, and what is named."""

import json
from pathlib import Path

import pytest
import yaml

from adapterhub_local.recipe import load_recipe
from adapterhub_local.recipe.convert import convert_settings
from adapterhub_local.recipe.foreign import Imported, read_settings
from adapterhub_local.settings import Home
from tests.recipe.test_recipe_cli import qhub

MODEL = "base_model: Qwen/Qwen2.5-0.5B-Instruct\n"
YAML = {  # a config -> what the recipe must say, and what must be named
    "axolotl: qlora on a chat set": (
        MODEL + "load_in_4bit: true\nadapter: qlora\ndatasets:\n  - path: fozziethebeat/alpaca_messages_2k_test\n"
        "    type: chat_template\n    field_messages: dialog\n    message_property_mappings:\n      role: from\n"
        "      content: value\n    roles:\n      user: [human]\n      assistant: [gpt]\nval_set_size: 0.05\n"
        "sequence_len: 2048\nsample_packing: true\nlora_r: 32\nlora_alpha: 16\nlora_dropout: 0.05\n"
        "lora_target_linear: true\ngradient_accumulation_steps: 4\nmicro_batch_size: 2\nnum_epochs: 3\n"
        "optimizer: adamw_bnb_8bit\nlr_scheduler: cosine\nlearning_rate: 2e-4\nbf16: auto\ntf32: false\n"
        "gradient_checkpointing: true\nwarmup_ratio: 0.1\nevals_per_epoch: 4\nsaves_per_epoch: 1\nweight_decay: 0.0\n"
        "wandb_project:\noutput_dir: ./outputs/lora-out\n",
        {"data.train": "hf://datasets/fozziethebeat/alpaca_messages_2k_test", "data.format": "messages",
         "data.columns": {"messages": "dialog", "role": "from", "content": "value"}, "data.test_share": 0.05,
         "data.roles": {"human": "user", "gpt": "assistant"}, "data.max_length": 2048, "adapter.rank": 32,
         "adapter.alpha": 16, "adapter.target_modules": "all-linear", "train.batch_size": 8,
         "train.micro_batch_size": 2, "train.epochs": 3, "train.optimizer": "adamw_8bit",
         "train.learning_rate": 2e-4, "train.activation_checkpointing": True, "train.warmup": 0.1,
         "output.name": "lora-out", "base.name": "qwen2.5-0.5b-instruct"},
        {"load_in_4bit", "adapter", "evals_per_epoch", "saves_per_epoch"},
    ),
    "axolotl: files, other split, other format": (
        MODEL + "datasets:\n  - path: json\n    data_files: [a.jsonl, b.jsonl]\n    type: alpaca\n    shards: 10\n"
        "  - path: org/set\n    split: train_sft\n    type: my_own.load\nval_set_size: 100\noptimizer: lion_8bit\n",
        {"data.train": ["a.jsonl", "b.jsonl", "hf://datasets/org/set"], "data.format": "alpaca"},
        {"datasets.shards", "datasets.split", "datasets.type", "val_set_size", "optim"},
    ),
    "axolotl: preferences": (
        MODEL + "rl: dpo\nrl_beta: 0.2\ndatasets:\n  - path: org/pairs\nlr_scheduler: warmup_stable_decay\n"
        "lr_scheduler_kwargs: {num_decay_steps: 20, min_lr_ratio: 0.1}\nmax_steps: 100\nwarmup_steps: 10\n",
        {"train.objective": "dpo", "preference.beta": 0.2, "train.schedule": "wsd", "train.decay": 0.2,
         "train.min_rate": 0.1, "train.max_steps": 100, "train.warmup": 0.1},
        set(),
    ),
    "axolotl: whole text, chat template, FSDP": (
        MODEL + "chat_template: chatml\ndatasets: [{path: t.txt, type: completion}]\ntrain_on_inputs: true\n"
        "fsdp: [full_shard]\ncosine_min_lr_ratio: 0.1\nlora_modules_to_save: [embed_tokens]\nspecial_tokens: {pad: x}\n"
        "tokens: [x]\nearly_stopping_patience: 3\neval_steps: 20\nplugins: [axolotl.integrations.liger.LigerPlugin]\n",
        {"data.chat_template": "chatml", "data.format": "text", "data.loss_on": "all", "train.min_rate": 0.1,
         "train.patience": 3, "train.eval_every": 20},
        {"fsdp", "lora_modules_to_save", "special_tokens", "tokens", "plugins"},
    ),
    "axolotl: the template of a tokenizer": (
        MODEL + "chat_template: tokenizer_default\ndatasets: [{path: a.jsonl}]\npacking: false\nfp16: true\n",
        {"data.train": "a.jsonl", "train.packed_tokens": 0},
        {"fp16"},
    ),
    "LLaMA-Factory: sft": (
        ("model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct\nstage: sft\ndo_train: true\nfinetuning_type: lora\n"
        "lora_rank: 8\nlora_target: all\ndataset: identity,alpaca_en_demo\ntemplate: llama3\ncutoff_len: 2048\n"
        "max_samples: 1000\noverwrite_cache: true\npreprocessing_num_workers: 16\noutput_dir: saves/llama3/lora/sft\n"
        "logging_steps: 10\nsave_steps: 500\nplot_loss: true\nper_device_train_batch_size: 1\n"
        "gradient_accumulation_steps: 8\nlearning_rate: 1.0e-4\nnum_train_epochs: 3.0\nlr_scheduler_type: cosine\n"
        "warmup_ratio: 0.1\nbf16: true\nddp_timeout: 180000000\nresume_from_checkpoint: null\n"),
        {"adapter.rank": 8, "adapter.target_modules": "all-linear", "data.train": ["identity", "alpaca_en_demo"],
         "data.max_length": 2048, "data.limit": 1000, "train.batch_size": 8, "train.micro_batch_size": 1,
         "train.learning_rate": 1e-4, "train.epochs": 3, "train.save_every": 500, "output.name": "sft",
         "train.compute": "bfloat16"},
        {"template", "do_train", "overwrite_cache", "preprocessing_num_workers", "logging_steps", "plot_loss",
         "ddp_timeout"},
    ),
    "LLaMA-Factory: simpo by its loss": (
        ("model_name_or_path: x/y\nstage: dpo\npref_loss: simpo\npref_beta: 2.5\nfinetuning_type: lora\n"
        "lora_target: q_proj,v_proj\ndataset: dpo_en_demo\n"),
        {"train.objective": "simpo", "preference.beta": 2.5, "adapter.target_modules": ["q_proj", "v_proj"]},
        set(),
    ),
    "LLaMA-Factory: kto": (
        "model_name_or_path: x/y\nstage: kto\ndataset: kto_en_demo\nadapter_name_or_path: saves/x\n",
        {"train.objective": "kto"},
        {"adapter_name_or_path"},
    ),
    "LLaMA-Factory: pre-training": (
        "model_name_or_path: x/y\nstage: pt\ndataset: c4_demo\nval_size: 0.1\n",
        {"data.loss_on": "all", "data.test_share": 0.1},
        set(),
    ),
    "LLaMA-Factory: last answers, LoRA+": (
        "model_name_or_path: x/y\ndataset: a.json\nmask_history: true\nloraplus_lr_ratio: 16.0\nneat_packing: true\n",
        {"data.loss_on": "last_answer", "train.loraplus_ratio": 16},
        set(),
    ),
    "TRL: sft": (
        ("model_name_or_path: Qwen/Qwen2.5-0.5B\ndataset_name: trl-lib/Capybara\nlearning_rate: 2.0e-4\n"
        "per_device_train_batch_size: 2\ngradient_accumulation_steps: 8\nuse_peft: true\nlora_r: 32\nlora_alpha: 16\n"
        "lora_target_modules: [q_proj, v_proj]\nmax_length: 1024\nassistant_only_loss: true\nseed: 7\n"
        "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr_rate: 0.1}\nwarmup_steps: 20\n"
        "report_to: [wandb]\neos_token: <|im_end|>\n"),
        {"data.train": "hf://datasets/trl-lib/Capybara", "train.schedule": "cosine", "train.min_rate": 0.1,
         "train.seed": 7, "adapter.rank": 32, "data.max_length": 1024},
        {"use_peft", "warmup_steps", "report_to", "eos_token"},
    ),
    "out of range": (
        MODEL + "dataset: a.jsonl\nlora_r: 100000\nlearning_rate: fast\nseed: -5\nlora_dropout: .nan\n",
        {"data.train": "a.jsonl"},
        {"adapter.rank", "learning_rate", "train.seed", "adapter.dropout"},
    ),
    "no data": ("base_model: x/y\n", {"data.train": "train.jsonl"}, set()),
}  # fmt: skip
PEFT = {"base_model_name_or_path": "x/y", "peft_type": "LORA", "r": 16, "lora_alpha": 32, "use_rslora": True,
        "target_modules": ["q_proj", "v_proj"], "bias": "none", "task_type": "CAUSAL_LM", "modules_to_save": None,
        "rank_pattern": {}, "alpha_pattern": {}, "use_dora": False, "inference_mode": True}  # fmt: skip
NOTEBOOK = [
    "%%capture\n!pip install unsloth",
    (
        "from unsloth import FastLanguageModel\nmax_seq_length = 2048\n"
        "model, tokenizer = FastLanguageModel.from_pretrained(\n"
        '    model_name = "unsloth/Qwen2.5-7B-bnb-4bit",\n    max_seq_length = max_seq_length,\n    dtype = None,\n'
        "    load_in_4bit = True,\n)"
    ),
    (
        'model = FastLanguageModel.get_peft_model(model, r = 16, target_modules = ["q_proj", "k_proj"],\n'
        "    lora_alpha = 16,\n"
        '    lora_dropout = 0, bias = "none", use_gradient_checkpointing = "unsloth", random_state = 3407,\n'
        "    use_rslora = False, loftq_config = None)"
    ),
    'from datasets import load_dataset\ndataset = load_dataset("yahma/alpaca-cleaned", split = "train")',
    (
        "trainer = SFTTrainer(model = model, tokenizer = tokenizer, train_dataset = dataset,\n"
        "    args = SFTConfig(per_device_train_batch_size = 2, gradient_accumulation_steps = 4, warmup_steps = 5,\n"
        '        max_steps = 60, learning_rate = 2e-4, optim = "adamw_8bit", weight_decay = 0.01,\n'
        '        lr_scheduler_type = "linear", seed = 3407, fp16 = not has_bf16(), output_dir = "outputs"))'
    ),
]


def imported(path: Path) -> Imported:
    return convert_settings(read_settings(path), lambda model: None)


@pytest.mark.parametrize(("text", "given", "named"), YAML.values(), ids=YAML)
def test_configs(text: str, given: dict, named: set, tmp_path: Path) -> None:
    """Each setting is in the recipe, or named with a reason; nothing is lost in between."""
    (tmp_path / "config.yml").write_text(text)
    found = imported(tmp_path / "config.yml")
    assert {key: found.given.get(key) for key in given} == given
    assert set(found.dropped) == named
    assert all(found.dropped.values())


def test_a_peft_config(tmp_path: Path) -> None:
    """An adapter_config.json gives the shape of the adapter; what says nothing is not named."""
    (tmp_path / "adapter_config.json").write_text(json.dumps(PEFT))
    found = imported(tmp_path / "adapter_config.json")
    assert found.given["adapter.rslora"] is True
    assert found.given["adapter.rank"] == 16
    assert found.given["adapter.target_modules"] == ["q_proj", "v_proj"]
    assert set(found.dropped) == {"peft_type", "task_type", "inference_mode"}


@pytest.mark.parametrize("kind", ["ipynb", "py"])
def test_an_unsloth_notebook(kind: str, tmp_path: Path) -> None:
    """A notebook's or script's calls are read and not run; what they compute is named."""
    cells = [{"cell_type": "code", "source": cell.splitlines(keepends=True)} for cell in NOTEBOOK]
    cells.append({"cell_type": "markdown", "source": ["SFTTrainer(max_steps = 1)"]})
    path = tmp_path / f"train.{kind}"
    path.write_text(json.dumps({"cells": cells}) if kind == "ipynb" else "\n".join(NOTEBOOK[1:]))
    found = imported(path)
    wanted = {
        "base.name": "qwen2.5-7b-bnb-4bit", "data.train": "hf://datasets/yahma/alpaca-cleaned", "train.batch_size": 8,
        "train.max_steps": 60, "train.schedule": "linear", "train.optimizer": "adamw_8bit", "train.seed": 3407,
        "train.activation_checkpointing": True, "data.max_length": 2048, "output.name": "outputs",
        "adapter.target_modules": ["q_proj", "k_proj"],
    }  # fmt: skip
    assert {key: found.given.get(key) for key in wanted} == wanted
    assert set(found.dropped) == {"load_in_4bit", "fp16"}


BAD = {
    "nothing there": ("none.yml", None, "there is no file"),
    "not YAML": ("a.yml", "a: [", "cannot be read"),
    "a list": ("a.yml", "- 1", "has no settings"),
    "not Python": ("a.py", "def (", "cannot be read"),
    "a script of something else": ("a.py", "print(1)", "no call that sets up a training run"),
    "not a notebook": ("a.ipynb", "{}", "is not a notebook"),
    "full fine-tuning": ("a.yml", "finetuning_type: full\nstage: sft\n", "finetuning_type is full: only adapters"),
    "a reward model": ("a.yml", "stage: rm\n", "it trains by 'rm': here there is sft, dpo"),
}


@pytest.mark.parametrize(("name", "text", "told"), BAD.values(), ids=BAD)
def test_what_cannot_be_taken_over(
    name: str, text: str | None, told: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A file that is not a run of adapters is refused in a sentence, with exit code 2; nothing is written."""
    if text is not None:
        (tmp_path / name).write_text(text)
    code, _, error = qhub(capsys, "recipe", "import", tmp_path / name, "-o", tmp_path / "r.toml")
    assert code == 2
    assert told in error
    assert error.count("\n") == 1
    assert not (tmp_path / "r.toml").exists()


def test_the_recipe_that_is_written_is_read(home: Home, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The command writes a recipe that can be loaded, and prints what it did not take over, and the next step."""
    text, given, _ = YAML["axolotl: preferences"]
    config = {**yaml.safe_load(text), "datasets": [{"path": "pairs.jsonl"}], "deepspeed": "zero3.json"}
    (tmp_path / "axolotl.yml").write_text(yaml.safe_dump(config))
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    target = tmp_path / "recipe.toml"
    code, output, _ = qhub(capsys, "recipe", "import", tmp_path / "axolotl.yml", "-o", target)
    recipe = load_recipe(target)

    assert code == 0
    assert "deepspeed: `qhub train --nproc` shares a run" in output
    assert "qhub base add qwen2.5-0.5b-instruct Qwen/Qwen2.5-0.5B-Instruct" in output
    assert recipe.train.max_steps == given["train.max_steps"]
    assert recipe.train.schedule == "wsd"
    assert "# not taken over: deepspeed" in target.read_text()
    assert qhub(capsys, "recipe", "import", tmp_path / "axolotl.yml", "-o", target)[0] == 2
