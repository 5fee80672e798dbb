"""`qhub eval`: loss, exact match and other metrics on held-out data, compared, and kept with the version."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from adapterhub_local import settings
from adapterhub_local.cli.output import echo, print_json, print_table, reporter, score_text
from adapterhub_local.errors import InputError
from adapterhub_local.registry import Registry


@click.command(name="eval")
@click.argument("references", nargs=-1, required=True)
@click.option("--data", "source", help="Held-out examples: a file or a Hub dataset, as in a recipe.")
@click.option(
    "--lm-eval",
    type=click.Path(path_type=Path),
    help="Instead of --data: tasks of lm-evaluation-harness, file or folder.",
)
@click.option("--against", default="", metavar="A,B", help="Compare with these: `base`, adapters, other bases.")
@click.option("--choices", metavar="A,B", help="Measure accuracy: which of these answers is the most likely.")
@click.option("--regex", metavar="PATTERN", help="Share of written answers it matches, groups as in the reference.")
@click.option("--json-valid", is_flag=True, help="Share of written answers that are JSON.")
@click.option("--tool-calls", is_flag=True, help="Shares of written answers with right calls: form, tools, arguments.")
@click.option(
    "--rewards",
    type=click.Path(path_type=Path),
    metavar="RECIPE",
    help="Mean reward of written answers by a recipe's [reward]; a grpo adapter's own are scored anyway.",
)
@click.option("--allow-code", is_flag=True, help="Run the Python code of reward.python, which is not run otherwise.")
@click.option("--task", help="What to file the scores under; the data file's name if not given.")
@click.option("--limit", type=click.IntRange(1), help="Score at most this many examples.")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Examples per forward pass.")
@click.option(
    "--max-length", type=click.IntRange(8), default=1024, show_default=True, help="Longest example in tokens."
)
@click.option(
    "--max-new-tokens", type=click.IntRange(1), default=256, show_default=True, help="Most tokens of a written answer."
)
@click.option("--format", "format_", help="What an example looks like, as data.format of a recipe.")
@click.option(
    "--template", help="chat or plain, as data.template of a recipe; as the adapter was trained if not given."
)
@click.option("--prompt", help="The prompt made of columns, as data.prompt of a recipe.")
@click.option("--answer", help="The answer made of columns, as data.answer of a recipe.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with 95 % intervals.")
def command(
    references: tuple[str, ...],
    source: str | None,
    lm_eval: Path | None,
    against: str,
    choices: str | None,
    regex: str | None,
    json_valid: bool,
    tool_calls: bool,
    rewards: Path | None,
    allow_code: bool,
    task: str | None,
    limit: int | None,
    batch_size: int,
    max_length: int,
    max_new_tokens: int,
    format_: str | None,
    template: str | None,
    prompt: str | None,
    answer: str | None,
    as_json: bool,
) -> None:
    """Score REFERENCES, adapters and bases of one base, on held-out data.

    \b
    qhub eval both smollm2 --data recipes/data/origin.test.jsonl --task origin
    qhub eval sentiment --data recipes/data/sentiment.test.jsonl --against base,sentiment@1 --choices positive,negative
    qhub eval sentiment --lm-eval tasks/ --against base

    Exact match is the share of answers that greedy decoding writes token for token. With --against, each difference
    comes with its 95 % interval over the same examples. Scores of adapters are kept: `qhub list` and `qhub show`.
    """
    from adapterhub_local.evaluate.comparison import compare, find_data, what_to_score
    from adapterhub_local.recipe.reader import check_data_settings

    if (source is None) == (lm_eval is None):
        raise InputError("give --data with held-out examples, or --lm-eval with tasks of lm-evaluation-harness")
    if allow_code:
        settings.allow_code()
    registry = Registry()
    others = [text.strip() for text in against.split(",") if text.strip()]
    if lm_eval is not None:
        unused: dict[str, Any] = {"choices": choices, "regex": regex, "json-valid": json_valid or None}
        unused |= {"tool-calls": tool_calls or None, "format": format_}
        unused |= {"rewards": rewards, "prompt": prompt, "answer": answer, "task": task}
        if excluded := [f"--{name}" for name, value in unused.items() if value is not None]:
            raise InputError(f"{', '.join(excluded)} and --lm-eval exclude each other: the task files decide that")
        check_data_settings({"template": template})
        _harness(references, others, registry, lm_eval, template, limit, batch_size, as_json)
        return
    assert source is not None, "one of the two was given"
    form = {"format": format_, "template": template, "prompt": prompt, "answer": answer}
    find_data(source)  # reports a wrong path before anything heavy is loaded
    check_data_settings(form)
    done = compare(
        what_to_score(references, others, registry), source, registry, task=task,
        choices=None if choices is None else [text.strip() for text in choices.split(",")], regex=regex,
        json_valid=json_valid, tool_calls=tool_calls, max_new_tokens=max_new_tokens, rewards=rewards, limit=limit,
        batch_size=batch_size, max_length=max_length, reporter=reporter(), **form,
    )  # fmt: skip
    for text, why in done.not_kept.items():
        _warn(done.subjects.shown(text), why)
    if as_json:
        print_json(done.to_json())
        return
    results, shown = done.scores, done.subjects.shown
    bodies = {text: score.to_json_with_intervals() for text, score in results.items()}
    first = next(iter(bodies.values()))
    metrics = [name for name in first["intervals"] if name not in ("loss", "perplexity")]
    rows = [
        (shown(text), bodies[text]["rows"],
         *(score_text(name, bodies[text][name], bodies[text]["intervals"][name]) for name in (*metrics, "loss")),
         f"{score.perplexity:.3f}")
        for text, score in results.items()
    ]  # fmt: skip
    print_table((done.task, "rows", *(name.replace("_", " ") for name in metrics), "loss", "perplexity"), rows)
    for text in references:
        _print_differences(shown(text), done.kept[text])


def _warn(name: str, why: str) -> None:
    echo(f"warning: the scores of {name} are not kept: {why}", err=True)


def _harness(
    references: tuple[str, ...],
    others: list[str],
    registry: Registry,
    path: Path,
    template: str | None,
    limit: int | None,
    batch_size: int,
    as_json: bool,
) -> None:
    """Score on the tasks at `path`, keep the results with the versions, and print them."""
    from adapterhub_local.evaluate.comparison import keep, what_to_score
    from adapterhub_local.evaluate.harness import find_tasks, harness, run_tasks

    tasks = find_tasks(path)  # reports mistakes before the base is loaded
    subjects = what_to_score(references, others, registry)
    from adapterhub_local.base.load import compute_dtype, load_base
    from adapterhub_local.evaluate.evaluate import adapted

    base, show = load_base(subjects.info, dtype=compute_dtype()), reporter()
    results = {}
    for text, version in subjects.versions.items():
        with show.counting(f"scoring {text}"), adapted(base, version.path if version else None) as model:
            results[text] = run_tasks(base, model, tasks, batch_size, limit=limit, is_chat=template == "chat")
    versions, names = subjects.versions, {text: subjects.shown(text) for text in subjects.versions}
    how = {"harness": harness(), "template": template or "plain", "limit": limit}
    kept_scores: dict[str, Any] = {}
    for task in tasks.names:
        for text in references:
            ours = results[text][task]
            kept: dict[str, Any] = {"adapter": ours.to_json(), "data": ours.data, "how": how}
            for other in subjects.compared:
                who = "base" if versions[other] is None else names[other]
                kept[who] = results[other][task].to_json() | {"difference": ours.differences(results[other][task])}
            kept_scores.setdefault(task, {})[names[text]] = kept
            if why := keep(registry, versions[text], task, kept):
                _warn(names[text], why)
    if as_json:
        scores = {task: {names[text]: results[text][task].to_json() for text in results} for task in kept_scores}
        print_json({"scores": scores, "kept": kept_scores})
        return
    for task in tasks.names:
        metrics = list(results[references[0]][task].metrics)
        rows = []
        for text in results:
            scored = results[text][task]
            intervals = scored.intervals()
            cells = [score_text(name, scored.metrics[name], intervals.get(name)) for name in metrics]
            rows.append((names[text], scored.rows, *cells))
        print_table((task, "rows", *(name.replace("_", " ") for name in metrics)), rows)
        for who, kept in kept_scores[task].items():
            _print_differences(who, kept)


def _print_differences(name: str, kept: Mapping[str, Any]) -> None:
    for who, part in kept.items():
        for metric, found in (part.get("difference") or {}).items() if isinstance(part, dict) else ():
            clear = "" if found["is_clear"] else ", may be chance"
            value = score_text(metric, found["value"], found["interval"], is_signed=True)
            echo(f"{name} minus {who}, {metric.replace('_', ' ')}: {value}{clear}")
        if isinstance(part, dict) and (won := part.get("win_rate")):
            share = score_text("accuracy", won["value"], won["interval"])
            echo(f"{name} prefers the chosen answer more than {who} in {share} of the pairs")
