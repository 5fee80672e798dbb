"""Answers that GRPO draws: by the serving engine over the trained base, against transformers' generate with PEFT.

    python -m benchmarks.draws [--base smollm2] [--prompts 16] [--samples 8] [--tokens 4,48] [--rounds 2]

One process, one model, both ways by turns: the adapter of recipes/sentiment-grpo.toml at its start, its prompts,
answers that do not end before `--tokens`. The first draw of each way is left out. The last line is JSON.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, peak_memory_mb

RECIPE = Path(__file__).parent.parent / "recipes" / "sentiment-grpo.toml"


def prepare(base_name: str, prompts: int, samples: int, tokens: int) -> tuple[Any, Any]:
    """The objective with its engine, and the examples whose prompts are answered."""
    from adapterhub_local.base.bases import find_base
    from adapterhub_local.base.load import load_base
    from adapterhub_local.data.dataset import read_data
    from adapterhub_local.recipe import load_recipe
    from adapterhub_local.rows.judged import tokenise_items
    from adapterhub_local.settings import home
    from adapterhub_local.train.adapter import with_adapter
    from adapterhub_local.train.objectives import make_objective

    changes = [f"base.name={base_name}", f"reward.samples={samples}", f"reward.max_tokens={tokens}"]
    recipe = load_recipe(RECIPE, [*changes, f"data.limit={prompts}"])
    base = load_base(find_base(base_name, home()))
    found, _ = tokenise_items(read_data(recipe), base.tokenizer, recipe.data, "answers", prompts)
    examples: list[Any] = list(found.items)
    model = with_adapter(base, recipe)
    return make_objective(model, examples, recipe, tokenizer=base.tokenizer, info=base.info), examples


def tokens_a_second(goal: Any, examples: list[Any], samples: int, tokens: int) -> float:
    """Tokens of answers that are drawn in a second; answers go on to their limit."""
    begun = time.perf_counter()
    found = goal._draw(examples, samples)
    seconds = time.perf_counter() - begun
    drawn = sum(answer.num_labels for one in found for answer in one.answers)
    assert drawn <= len(examples) * samples * tokens
    return drawn / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", default="4,48")
    parser.add_argument("--rounds", type=int, default=2)
    chosen = parser.parse_args()
    results = {}
    for tokens in map(int, chosen.tokens.split(",")):
        goal, examples = prepare(chosen.base, chosen.prompts, chosen.samples, tokens)
        goal.ends = (1 << 30,)  # no token: else both would be measured on answers of other lengths
        drawer, found = goal.drawer, {"engine": [], "generate": []}  # type: ignore[var-annotated]
        for number in range(chosen.rounds + 1):
            for way in found:
                goal.drawer = drawer if way == "engine" else None
                speed = tokens_a_second(goal, examples, chosen.samples, tokens)
                print(f"{tokens} tokens, {way}: {speed:.1f} tokens/s", file=sys.stderr, flush=True)
                if number:
                    found[way].append(round(speed, 1))
        middle = {way: statistics.median(speeds) for way, speeds in found.items()}
        results[tokens] = {**found, "ratio": round(middle["engine"] / middle["generate"], 2)}
    print(json.dumps({"benchmark": "draws", "machine": machine(), "peak_memory_mb": peak_memory_mb(),
                      "prompts": chosen.prompts, "samples": chosen.samples, "tokens_per_second": results}))  # fmt: skip


if __name__ == "__main__":
    main()
