"""A training run from recipe to registered version: the main line of `qhub train`."""

import json
import platform
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import torch

from adapterhub_local.base.load import LoadedBase, choose_device, import_bitsandbytes, load_base, quiet_loading
from adapterhub_local.base.store import BaseInfo, find_base
from adapterhub_local.durable import canonical_json, digest_bytes, digest_file, staging
from adapterhub_local.errors import InputError, InUse, NotFound, Stopped
from adapterhub_local.evaluate.metrics import Score, evaluate
from adapterhub_local.lora.config import AdapterConfig
from adapterhub_local.lora.write import tensor_name, write_adapter
from adapterhub_local.recipe import Recipe
from adapterhub_local.registry import Registry, Version
from adapterhub_local.settings import Home
from adapterhub_local.train.curve import read_curve
from adapterhub_local.train.examples import Example, read_chats, tokenise
from adapterhub_local.train.progress import Quiet, Reporter
from adapterhub_local.train.trainer import Watch, choose_optimizer, make_trainer, steps_of

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "safetensors", "accelerate")


def train(
    recipe: Recipe, home: Home, *, resume: bool = False, restart: bool = False, reporter: Reporter | None = None
) -> Version:
    """Train the adapter a recipe describes, evaluate it beside its base, and register it as a version.

    A run that is stopped (Ctrl-C, SIGTERM) keeps its state under `runs/`; `resume` goes on from there and
    ends with the same adapter, `restart` throws that state away. Raises Stopped, and the InputErrors of
    recipe, base and data before anything is written.
    """
    reporter = reporter or Quiet()
    info = find_base(recipe.base.name, home)
    chats = read_chats(recipe.data.train, recipe.data.limit)
    test_chats = read_chats(recipe.data.test, recipe.eval.limit) if recipe.data.test else []
    run = Run(recipe, info, home)
    checkpoint = run.find_checkpoint(resume=resume, restart=restart)

    reporter.note(f"base {info.name}: loading")
    base = load_base(info, dtype=compute_dtype(recipe.train.compute))
    examples = tokenise(chats, base.tokenizer, recipe.data.max_length, recipe.data.train)
    tests = tokenise(test_chats, base.tokenizer, recipe.data.max_length, recipe.data.test) if recipe.data.test else []
    model = with_adapter(base, recipe)
    statistics = fit(model, examples, recipe, run, checkpoint, reporter)
    model.eval()
    scores = {}
    if tests:
        with reporter.counting("evaluating the adapter") as progress:
            scores["adapter"] = evaluate(model, tests, recipe.eval.batch_size, progress)
        with model.disable_adapter(), reporter.counting("evaluating the base") as progress:
            scores["base"] = evaluate(model, tests, recipe.eval.batch_size, progress)
    with staging(home.tmp) as folder:
        files = save(model, recipe, info, folder)
        lineage = run.lineage(model, scores, statistics, len(examples))
        published = Registry(home).publish(recipe.output.name, files, lineage, alias=recipe.output.alias)
    run.finish()
    return published


def with_adapter(base: LoadedBase, recipe: Recipe) -> Any:
    """The base as a PEFT model with fresh factors: A random by the recipe's seed, B zero."""
    import_bitsandbytes()  # before peft imports it
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    set_seed(recipe.train.seed)  # before the factors are drawn
    adapter = recipe.adapter
    targets = adapter.target_modules
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # PEFT takes any number
        use_rslora=adapter.rslora,
        lora_dropout=adapter.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(base.model, config)
    except ValueError as error:
        raise InputError(f"adapter.target_modules = {targets!r}: {str(error).split('. ')[0]}") from None


def fit(
    model: Any, examples: list[Example], recipe: Recipe, run: "Run", checkpoint: Path | None, reporter: Reporter
) -> dict[str, Any]:
    """Run the optimizer over the examples; returns steps, tokens, seconds and the last loss."""
    steps = steps_of(len(examples), recipe.train)
    tokens_a_step = sum(len(example.ids) for example in examples) / len(examples) * recipe.train.batch_size
    log: list[dict[str, float]] = []
    with quiet_loading(), reporter.training(steps, tokens_a_step) as report, run.logging() as write:

        def note(entry: dict[str, float]) -> None:
            log.append(entry)
            write(entry)
            report(int(entry["step"]), entry["loss"])

        trainer, watch = make_trainer(model, examples, recipe.train, run.folder, note)
        start = time.perf_counter()
        with stopping(watch):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        seconds = time.perf_counter() - start
    if trainer.state.global_step < steps:
        raise Stopped(
            f"stopped at step {trainer.state.global_step} of {steps}; the state is kept in {run.folder}. "
            "Go on: the same command with --resume. Begin anew: with --restart"
        )
    return {
        "steps": steps,
        "tokens_per_second": round(len(log) * tokens_a_step / seconds, 1),
        "seconds": round(seconds, 1),
        "loss": log[-1]["loss"],
    }


def save(model: Any, recipe: Recipe, info: BaseInfo, folder: Path) -> dict[str, Path | bytes]:
    """Write the trained factors as the two files of an adapter; equal factors give equal files."""
    factors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            module, _, factor = name.removeprefix("base_model.model.").partition(".lora_")
            factors[tensor_name(module, factor[0])] = parameter.detach().float().cpu()
    modules = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in factors}
    targets = recipe.adapter.target_modules
    config = AdapterConfig(
        rank=recipe.adapter.rank,
        alpha=recipe.adapter.alpha,
        target_modules=tuple(sorted({name.rsplit(".", 1)[-1] for name in modules}))
        if isinstance(targets, str)
        else targets,
        use_rslora=recipe.adapter.rslora,
        base_model=info.hub_id,
    )
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in sorted(factors.items())}
    return write_adapter(folder, config, shapes, sorted(factors.items()), info.fingerprint)


def compute_dtype(wanted: str) -> torch.dtype:
    """The dtype of activations: `auto` is bfloat16 where the hardware has matrix units for it."""
    if wanted != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]
    fast = torch.cuda.is_bf16_supported() if choose_device() == "cuda" else torch.cpu.get_capabilities().get("amx_bf16")
    return torch.bfloat16 if fast else torch.float32


class Run:
    """The folder of one run, named after all that decides its result, so that only the same run can be resumed."""

    def __init__(self, recipe: Recipe, info: BaseInfo, home: Home) -> None:
        self.recipe, self.info = recipe, info
        self.data = [self._record(role, path) for role, path in vars(recipe.data).items() if isinstance(path, Path)]
        decisive = {"recipe": recipe.to_json(), "data": self.data, "base": info.fingerprint}
        identity = digest_bytes(canonical_json(decisive)).removeprefix("sha256:")[:12]
        self.folder = home.runs / f"{recipe.output.name.replace('/', '.')}-{identity}"

    def find_checkpoint(self, *, resume: bool, restart: bool) -> Path | None:
        """The state to go on from, if that is asked for. Raises NotFound, or InUse if the user must choose."""
        found = sorted(self.folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        if resume and not found:
            raise NotFound("no stopped run has this recipe, data and base: leave out --resume to begin one")
        if found and not resume and not restart:
            step = found[-1].name.rpartition("-")[2]
            raise InUse(
                f"a run of this recipe was stopped at step {step}: add --resume to go on or --restart to begin anew"
            )
        if restart:
            shutil.rmtree(self.folder, ignore_errors=True)
        return found[-1] if resume else None

    @contextmanager
    def logging(self) -> Iterator[Callable[[dict[str, float]], None]]:
        """A function that appends one line a step to the run's `log.jsonl`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:

            def write(entry: dict[str, float]) -> None:
                file.write(json.dumps(entry) + "\n")
                file.flush()

            yield write

    def lineage(self, model: Any, scores: dict[str, Score], statistics: dict[str, Any], rows: int) -> dict[str, Any]:
        """Where the version comes from; enough to train it again."""
        recipe = self.recipe
        peft_model = model.base_model
        targeted = recipe.adapter.target_modules
        lineage: dict[str, Any] = {
            "kind": "train",
            "task": recipe.task,
            "description": recipe.output.description,
            "base": self.info.lineage(),
            "adapter": {
                "rank": recipe.adapter.rank,
                "alpha": recipe.adapter.alpha,
                "target_modules": targeted if isinstance(targeted, str) else list(targeted),
                "num_modules": len(peft_model.targeted_module_names),
                "num_parameters": sum(part.numel() for part in model.parameters() if part.requires_grad),
            },
            "recipe": {"text": recipe.text, "digest": digest_bytes(recipe.text.encode()), "resolved": recipe.to_json()},
            "data": self.data,
            "seed": recipe.train.seed,
            "training": {
                **statistics,
                "curve": read_curve(self.folder / "log.jsonl"),
                "examples": rows,
                "compute": str(model.dtype).removeprefix("torch."),
                "optimizer": choose_optimizer(recipe.train.optimizer, model.device.type),
            },
            "environment": environment(model.device.type),
        }
        if scores:
            lineage["metrics"] = {
                recipe.task: {name: score.to_json() for name, score in scores.items()}
                | {"data": next(entry["digest"] for entry in self.data if entry["role"] == "test")}
            }
        return lineage

    def finish(self) -> None:
        """Drop the checkpoints of a run whose result is registered; its log stays."""
        for checkpoint in self.folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint, ignore_errors=True)

    def _record(self, role: str, path: Path) -> dict[str, Any]:
        with open(path, "rb") as file:
            rows = sum(1 for line in file if line.strip())
        return {"role": role, "file": path.name, "digest": digest_file(path), "rows": rows}


def environment(device: str) -> dict[str, str]:
    """The versions that decide a result, by package."""
    gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    versions = {name: installed(name) for name in PACKAGES}
    return {"python": platform.python_version(), "device": device, **gpu, **versions}


@contextmanager
def stopping(watch: Watch) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask the trainer to stop after the step; a second one stops at once."""

    def ask(number: int, frame: Any) -> None:
        if watch.stop_asked:
            raise KeyboardInterrupt
        watch.stop_asked = True

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: the caller handles signals
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
