"""What `qhub plan` says a run takes, beside what the run took: the peak resident size of `qhub train`, a process each.

    python -m benchmarks.plan                 # random models of three shapes, and the demo base where QHUB_HOME has it
    python -m benchmarks.plan --only deep-621 # cases whose name begins so

Resident size does not depend on how busy the machine is. The baseline is the rule of thumb that people use:
four bits a weight, and a fifth more.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import child, machine

SHAPES: dict[str, dict[str, Any]] = {
    "deep": {
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 16384,
    },
    "wide": {
        "hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 3, "num_attention_heads": 12,
        "num_key_value_heads": 4, "vocab_size": 32000,
    },
    "words": {
        "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 12,
        "num_key_value_heads": 12, "vocab_size": 100_000, "tie_word_embeddings": True,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A run: `base`, tokens and answer tokens of an example, examples a row, and changes to the recipe."""

    base: str
    length: int
    answer: int = 8
    row: int = 1
    changes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "-".join([self.base, str(self.length), str(self.answer), str(self.row), *self.changes])


CASES = (
    Case("deep", 170),
    Case("deep", 621),
    Case("deep", 1221),
    Case("deep", 170, 8, 4, ("adapter.rank=64",)),
    Case("deep", 621, 8, 1, ("train.activation_checkpointing=true",)),
    Case("deep", 621, 8, 1, ("train.compute=bfloat16",)),
    Case("deep", 621, 8, 1, ("adapter.dropout=0.1",)),
    Case("wide", 170),
    Case("wide", 621, 300),
    Case("wide", 321, 8, 3),
    Case("wide", 621, 8, 1, ("train.activation_checkpointing=true",)),
    Case("words", 400),
    Case("words", 400, 100, 2),
    Case("words", 400, 8, 1, ('adapter.target_modules="attention"',)),
    Case("smollm2", 300, 30, 2),
    Case("smollm2", 900, 30, 1, ("train.activation_checkpointing=true",)),
)


def build(folder: Path, base: str) -> None:
    """Add a random model of this shape as a base of the home at `folder`."""
    from adapterhub_local.base.add import add_base
    from adapterhub_local.settings import home
    from tests.tiny import save_tiny_model

    model = save_tiny_model(folder / "models" / base, max_position_embeddings=8192, **SHAPES[base])
    add_base(base, model, home(folder))


def write(folder: Path, case: Case) -> Path:
    """A recipe with four steps of one row each."""
    question = "abcdefghij klmnop qrstuv"
    per_token = 4 if case.base == "smollm2" else 1  # bytes: the random models have a token a byte
    rows = []
    for number in range(4 * case.row):
        text = f"{number:03d}" + question * (per_token * case.length // len(question) + 1)
        text = text[: per_token * (case.length - case.answer - 21)]
        answer = "x " * (case.answer - 1) if per_token == 4 else "x" * (case.answer - 1)
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer.strip()}]
        rows.append(json.dumps({"messages": messages}))
    (folder / "train.jsonl").write_text("\n".join(rows))
    recipe = folder / "recipe.toml"
    recipe.write_text(
        f'[base]\nname = "{case.base}"\n[data]\ntrain = "train.jsonl"\nmax_length = 8192\n'
        f"[train]\nbatch_size = {case.row}\npacked_tokens = 8192\n"
        '[output]\nname = "measured"\n'
    )
    return recipe


def measure(case: Case, home: Path) -> dict[str, Any]:
    """Plan and run one case; bytes planned and taken. Raises CalledProcessError if the run fails."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = write(Path(folder), case)
        changes = [part for change in case.changes for part in ("--set", change)]
        environment = {**os.environ, "QHUB_HOME": str(home), "QHUB_DEVICE": "cpu"}
        qhub = [sys.executable, "-m", "adapterhub_local"]
        planned = subprocess.run(
            [*qhub, "plan", str(recipe), "--json", *changes], env=environment, capture_output=True, check=True
        )
        command = [*qhub, "train", str(recipe), "--restart", *changes]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
    plan = json.loads(planned.stdout)
    taken, total = usage.ru_maxrss * 1024, plan["bytes"]["total"]
    return {
        "case": case.name,
        "row_tokens": plan["rows"]["row_tokens"],
        "planned_mb": round(total / 1e6, 1),
        "taken_mb": round(taken / 1e6, 1),
        "error": round(total / taken - 1, 4),
        "rule_of_thumb_error": round(1.2 * 0.5 * plan["model"]["num_parameters"] / taken - 1, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run the cases whose name begins so")
    parser.add_argument("--home", type=Path, help="where random bases are kept between runs; a temporary folder if not")
    parser.add_argument("--build", metavar="BASE", help="for the parent process")
    arguments = parser.parse_args()
    if arguments.build:
        build(arguments.home, arguments.build)
        print("{}")
        return
    from adapterhub_local.settings import home

    demo = home().root
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.home or Path(temporary)
        results = []
        for case in CASES:
            if not case.name.startswith(arguments.only):
                continue
            where = folder if case.base in SHAPES else demo
            if not (where / "bases" / case.base).is_dir():
                if case.base not in SHAPES:
                    print(f"{case.name}: left out, {where} has no base {case.base}", file=sys.stderr)
                    continue
                child("-m", "benchmarks.plan", "--build", case.base, "--home", str(where))
            results.append(measure(case, where))
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    errors = [result["error"] for result in results]
    print(
        json.dumps(
            {
                "benchmark": "plan",
                "machine": machine(),
                "workload": "qhub train on random and demo bases, 4 steps a run, peak resident size",
                "cases": results,
                "ours": {"mean_error": round(statistics.mean(map(abs, errors)), 4), "lowest": min(errors)},
                "baseline": {
                    "name": "4 bits a weight and 20 % more",
                    "mean_error": round(statistics.mean(abs(one["rule_of_thumb_error"]) for one in results), 4),
                    "lowest": min(one["rule_of_thumb_error"] for one in results),
                },
                "target": {"mean_error": 0.05, "lowest": -0.1},
            }
        )
    )


if __name__ == "__main__":
    main()
