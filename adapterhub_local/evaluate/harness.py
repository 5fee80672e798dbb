"""Tasks of EleutherAI's lm-evaluation-harness, as its own task files on this machine describe them.

The harness asks the base, with or without an adapter, as it does any transformers model; intervals and comparisons are
ours. A task file may name Python code beside it, which the harness runs: use files you would run.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import torch

from adapterhub_local.base.load import LoadedBase
from adapterhub_local.base.model import CausalModel
from adapterhub_local.durable import digest_bytes
from adapterhub_local.errors import InputError, NotFound
from adapterhub_local.intervals import Interval, bootstrap, wilson

FORMATS = ("json", "csv", "parquet", "text", "arrow")  # what `dataset_path` may be: readers of local files
RESAMPLES = 1000  # for the standard errors of metrics that are no means


@dataclass(frozen=True)
class TaskScore:
    """One task's metrics for one model. `values`: metric -> its value for each example, where it is their mean."""

    rows: int
    metrics: Mapping[str, float]
    values: Mapping[str, Sequence[float]]
    data: str  # `sha256:<hex>` of the examples

    def intervals(self) -> dict[str, Interval]:
        """Wilson's 95 % interval of every metric that is a share, the bootstrap's of those that are other means."""
        return {
            name: wilson(sum(values), self.rows) if set(values) <= {0.0, 1.0} else bootstrap(values, [1.0] * self.rows)
            for name, values in self.values.items()
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            **{name: round(value, 6) for name, value in self.metrics.items()},
            "intervals": {name: [round(bound, 6) for bound in bounds] for name, bounds in self.intervals().items()},
        }

    def differences(self, other: "TaskScore") -> dict[str, dict[str, Any]]:
        """Metric -> this less the other on the same examples, with its interval, and whether 0 lies outside."""
        found = {}
        for name in sorted(self.values.keys() & other.values.keys()):
            low, high = bootstrap(self.values[name], [1.0] * self.rows, other.values[name])
            value = (sum(self.values[name]) - sum(other.values[name])) / self.rows
            bounds = [round(low, 6), round(high, 6)]
            found[name] = {"value": round(value, 6), "interval": bounds, "is_clear": not low <= 0 <= high}
        return found


@dataclass(frozen=True)
class Tasks:
    """The tasks of a file or folder, by name; `manager` is the harness's."""

    path: Path
    names: tuple[str, ...]
    manager: Any


def harness() -> str:
    """The name and version of the harness. Raises InputError where it is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise InputError(
            "--lm-eval needs the package lm-eval (EleutherAI's lm-evaluation-harness): pip install 'lm-eval[hf]'"
        ) from None
    return f"lm-eval {installed('lm_eval')}"


def find_tasks(path: Path) -> Tasks:
    """The tasks at `path`, a task file or a folder of them. Raises NotFound, or InputError for those that are not
    local: whose data would come from the Hub."""
    if not path.exists():
        raise NotFound(f"there is no task file or folder {path}")
    harness()
    from lm_eval.tasks import TaskManager

    with _quiet(path):
        folder = path if path.is_dir() else path.parent
        manager = TaskManager(include_path=str(folder.resolve()), include_defaults=False)
        index = {
            name: entry for name, entry in manager.task_index.items()
            if path.is_dir() or (entry.yaml_path and Path(entry.yaml_path).resolve() == path.resolve())
        }  # fmt: skip
        for entry in index.values():
            _check_local(entry.cfg or {}, Path(entry.yaml_path or path))
        single = [name for name in index if name in manager.all_subtasks]
        loaded = manager.load(single)["tasks"] if single else {}
    if not loaded:
        raise InputError(f"{path} has no task: a task file of the harness is YAML with a key `task`")
    return Tasks(path, tuple(sorted(loaded)), manager)


def _check_local(config: Mapping[str, Any], path: Path) -> None:
    source = str(config.get("dataset_path", "json"))
    named = json.dumps(config.get("dataset_kwargs") or {}, default=str)
    if (source not in FORMATS and not Path(source).exists()) or "://" in named:
        raise InputError(
            f"{path}: its data would come from elsewhere (dataset_path: {source}): download them, and write one of "
            f"{', '.join(FORMATS)} with the file in dataset_kwargs.data_files"
        )


def run_tasks(
    base: LoadedBase,
    model: CausalModel,
    tasks: Tasks,
    batch_size: int,
    *,
    limit: int | None = None,
    is_chat: bool = False,
) -> dict[str, TaskScore]:
    """Task -> the scores of a model: the base's, or PEFT over it. `is_chat` asks in the base's chat template.

    Raises InputError with what the harness says of a task that cannot be run.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with _quiet(tasks.path):
        asked = HFLM(pretrained=model, tokenizer=base.tokenizer, batch_size=batch_size)
        found = simple_evaluate(
            model=asked, tasks=list(tasks.names), task_manager=tasks.manager, limit=limit, bootstrap_iters=RESAMPLES,
            apply_chat_template=is_chat, log_samples=True,
        )  # fmt: skip
    return {name: _score(found, name) for name in tasks.names}


def _score(found: Mapping[str, Any], name: str) -> TaskScore:
    samples = found["samples"][name]
    docs = {sample["doc_id"]: sample["doc"] for sample in samples}
    metrics: dict[str, float] = {}
    values: dict[str, list[float]] = {}
    for key, value in found["results"][name].items():
        metric, comma, chosen = key.partition(",")  # such as `exact_match,strict-match`
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        called = metric if chosen == "none" else f"{metric}_{chosen.replace('-', '_')}"
        metrics[called] = float(value)
        each = [sample.get(metric) for sample in samples if sample["filter"] == chosen]
        is_whole = len(each) == len(docs) and all(isinstance(one, int | float) for one in each)
        if is_whole and abs(sum(each) / len(each) - value) < 1e-9:
            values[called] = [float(one) for one in each]
    text = json.dumps([docs[number] for number in sorted(docs)], sort_keys=True, default=str)
    return TaskScore(len(docs), metrics, values, digest_bytes(text.encode()))


@contextmanager
def _quiet(path: Path) -> Iterator[None]:
    """The harness quiet and offline; what it raises is an InputError that names the task file."""
    import datasets
    import huggingface_hub.constants

    before = logging.root.manager.disable
    offline = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    logging.disable(logging.WARNING)
    terminal = os.dup(2)
    datasets.disable_progress_bars()
    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):  # its bars, and what git says to it
            os.dup2(nowhere.fileno(), 2)
            yield
    except (InputError, torch.OutOfMemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # whatever a task file makes of another library
        reason = (str(error).splitlines() or [""])[0][:300]
        raise InputError(f"{path}: lm-evaluation-harness cannot use it: {type(error).__name__}: {reason}") from None
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = offline
        logging.disable(before)
