"""`qhub eval`: loss, exact match and other metrics on held-out data, compared, and kept with the version."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub_local.cli.output import echo, print_json, print_table, score_text
from adapterhub_local.registry import Registry, Version
from adapterhub_local.settings import home

if TYPE_CHECKING:
    from adapterhub_local.base.bases import BaseInfo


@click.command(name="eval")
@click.argument("references", nargs=-1, required=True)
@click.option("--data", "source", help="Held-out examples: a file or a Hub dataset, as in a recipe.")
@click.option(
    "--lm-eval",
    type=click.Path(path_type=Path),
    help="Instead of --data: tasks of lm-evaluation-harness, file or folder.",
)
@click.option("--against", default="", metavar="A,B", help="Compare with these: `base`, adapters, other bases.")
@click.option("--choices", metavar="A,B", help="Accuracy: which of these answers is the most likely.")
@click.option("--regex", metavar="PATTERN", help="Share of written answers it matches, groups as in the reference.")
@click.option("--json-valid", is_flag=True, help="Share of written answers that are JSON.")
@click.option("--task", help="What to file the scores under; the data file's name if not given.")
@click.option("--limit", type=click.IntRange(1), help="Score the first so many examples only.")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Examples per forward pass.")
@click.option(
    "--max-length", type=click.IntRange(8), default=1024, show_default=True, help="Longest example in tokens."
)
@click.option(
    "--max-new-tokens", type=click.IntRange(1), default=256, show_default=True, help="Longest answer that is written."
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
    from adapterhub_local.base.bases import list_bases
    from adapterhub_local.data.dataset import Dataset, read_parts
    from adapterhub_local.errors import InputError, NotFound
    from adapterhub_local.recipe.reader import check_data_settings
    from adapterhub_local.recipe.source import local_problem, read_source

    if (source is None) == (lm_eval is None):
        raise InputError("give --data with held-out examples, or --lm-eval with tasks of lm-evaluation-harness")
    registry = Registry()
    names = {base.name for base in list_bases(home())}
    others = [text.strip() for text in against.split(",") if text.strip()]
    if "base" in references:
        raise InputError("name the base itself, as `qhub base list` shows it; `base` is for --against")
    named = dict.fromkeys((*references, *(text for text in others if text != "base")))
    versions = {text: None if text in names else registry.resolve(text) for text in named}
    adapters = [version for version in versions.values() if version is not None]
    if lm_eval is not None:
        unused = {"choices": choices, "regex": regex, "json-valid": json_valid or None, "format": format_}
        unused |= {"prompt": prompt, "answer": answer, "task": task}
        if excluded := [f"--{name}" for name, value in unused.items() if value is not None]:
            raise InputError(f"{', '.join(excluded)} and --lm-eval exclude each other: the task files say it")
        check_data_settings({"template": template})
        _harness(references, others, versions, lm_eval, template, limit, batch_size, as_json)
        return
    assert source is not None, "one of the two was given"
    place = read_source(source, Path())
    if isinstance(place, Path) and (wrong := local_problem(place)):
        raise NotFound(wrong.replace("no file", "no data file"))
    given = {"format": format_, "template": template, "prompt": prompt, "answer": answer}
    check_data_settings(given)
    from adapterhub_local.base.load import load_base
    from adapterhub_local.evaluate.choices import with_choices
    from adapterhub_local.evaluate.evaluate import Checks, data_settings, entry, read_tests, score
    from adapterhub_local.evaluate.written import read_pattern
    from adapterhub_local.progress import Quiet, Terminal

    info = _one_base(versions)
    pattern = read_pattern(regex) if regex is not None else None
    data = data_settings(adapters, **given)
    parts = read_parts([place], "test", data, limit)  # mistakes are told before the base is loaded
    dataset = Dataset([], [chat for part in parts for chat in part.chats], [part.record for part in parts], [])
    base = load_base(info)
    tests = read_tests(base, dataset.test, data, max_length)
    asked: tuple[Any, Any] = ((), ())
    if choices is not None:
        wanted = [text.strip() for text in choices.split(",")]
        asked = with_choices(dataset.test, wanted, base.tokenizer, tests.template)
    checks = Checks(*asked, pattern, json_valid, max_new_tokens)
    task = task or Path(source).name.partition(".")[0]
    reporter = Terminal() if sys.stderr.isatty() else Quiet()
    if "base" in others:
        versions.setdefault(info.name, None)
    results = {}
    for text, version in versions.items():
        with reporter.counting(f"scoring {text}") as progress:
            results[text] = score(base, version, tests.examples, batch_size, progress, checks)
    shown_names = {text: str(version or text) for text, version in versions.items()}
    compared = dict.fromkeys(info.name if text == "base" else text for text in others)
    kept = {}
    for text in references:
        scores = {"adapter": results[text]} | {
            "base" if versions[other] is None else shown_names[other]: results[other] for other in compared
        }
        kept[text] = entry(
            scores, dataset.test_digest, template=tests.template, limit=limit, choices=choices, regex=regex,
            max_new_tokens=max_new_tokens if checks.need_text else None,
        )  # fmt: skip
        if (version := versions[text]) is not None:
            _keep(registry, version, task, kept[text])
    if as_json:
        found = {shown_names[text]: result.to_json_with_intervals() for text, result in results.items()}
        differences = {
            shown_names[text]: {
                who: part["difference"]
                for who, part in kept[text].items()
                if isinstance(part, dict) and "difference" in part
            }
            for text in references
        }
        print_json({"task": task, "scores": found} | ({"differences": differences} if others else {}))
        return
    metrics = list(next(iter(results.values())).hits)
    rows = [
        (shown_names[text], s.rows, *(score_text(name, s.shares[name], s.intervals()[name]) for name in metrics),
         score_text("loss", s.loss, s.intervals()["loss"]), f"{s.perplexity:.3f}")
        for text, s in results.items()
    ]  # fmt: skip
    print_table((task, "rows", *(name.replace("_", " ") for name in metrics), "loss", "perplexity"), rows)
    for text in references:
        _print_differences(shown_names[text], kept[text])


def _keep(registry: Registry, version: Version, task: str, scores: dict[str, Any]) -> None:
    """Keep scores with a version; where nothing can be written they are shown all the same."""
    from adapterhub_local.errors import QhubError

    try:
        registry.add_evaluation(version, task, scores)
    except (OSError, QhubError) as error:
        echo(f"warning: the scores of {version} are not kept: {error}", err=True)


def _one_base(versions: Mapping[str, Version | None]) -> BaseInfo:
    """The base of all that is scored. Raises Incompatible if there are several."""
    from adapterhub_local.base.bases import find_base
    from adapterhub_local.errors import Incompatible
    from adapterhub_local.evaluate.evaluate import base_of

    bases = {
        find_base(text, home()) if version is None else base_of(version, home()) for text, version in versions.items()
    }
    if len({base.fingerprint for base in bases}) > 1:
        raise Incompatible("these are of several bases: score those of one base at a time")
    return bases.pop()


def _harness(
    references: tuple[str, ...],
    others: list[str],
    versions: dict[str, Version | None],
    path: Path,
    template: str | None,
    limit: int | None,
    batch_size: int,
    as_json: bool,
) -> None:
    """Score on the tasks at `path`, keep the results with the versions, and print them."""
    from adapterhub_local.evaluate.harness import find_tasks, harness, run_tasks

    tasks = find_tasks(path)  # mistakes are told before the base is loaded
    info = _one_base(versions)
    from adapterhub_local.base.load import load_base
    from adapterhub_local.evaluate.evaluate import adapted
    from adapterhub_local.progress import Quiet, Terminal

    base = load_base(info)
    reporter = Terminal() if sys.stderr.isatty() else Quiet()
    if "base" in others:
        versions.setdefault(info.name, None)
    results = {}
    for text, version in versions.items():
        with reporter.counting(f"scoring {text}"), adapted(base, version.path if version else None) as model:
            results[text] = run_tasks(base, model, tasks, batch_size, limit=limit, is_chat=template == "chat")
    names = {text: str(version or text) for text, version in versions.items()}
    compared = dict.fromkeys(info.name if text == "base" else text for text in others)
    how = {"harness": harness(), "template": template or "plain", "limit": limit}
    said: dict[str, Any] = {}
    for task in tasks.names:
        for text in references:
            ours = results[text][task]
            kept: dict[str, Any] = {"adapter": ours.to_json(), "data": ours.data, "how": how}
            for other in compared:
                who = "base" if versions[other] is None else names[other]
                kept[who] = results[other][task].to_json() | {"difference": ours.differences(results[other][task])}
            said.setdefault(task, {})[names[text]] = kept
            if (version := versions[text]) is not None:
                _keep(Registry(), version, task, kept)
    if as_json:
        print_json({"scores": {task: {names[text]: results[text][task].to_json() for text in results} for task in said},
                    "kept": said})  # fmt: skip
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
        for who, kept in said[task].items():
            _print_differences(who, kept)


def _print_differences(name: str, kept: Mapping[str, Any]) -> None:
    for who, part in kept.items():
        for metric, found in (part.get("difference") or {}).items() if isinstance(part, dict) else ():
            clear = "" if found["is_clear"] else ", may be chance"
            value = score_text(metric, found["value"], found["interval"], is_signed=True)
            echo(f"{name} less {who}, {metric.replace('_', ' ')}: {value}{clear}")
