"""`qhub eval`: exact match and loss on held-out data, kept with the version."""

import sys
from pathlib import Path

import click

from adapterhub_local.cli.output import print_json, print_table
from adapterhub_local.errors import NotFound
from adapterhub_local.registry import Registry
from adapterhub_local.settings import home


@click.command(name="eval")
@click.argument("references", nargs=-1, required=True)
@click.option("--data", type=click.Path(path_type=Path), required=True, help="JSONL file of held-out chats.")
@click.option("--task", help="What to file the scores under; the data file's name if not given.")
@click.option("--limit", type=click.IntRange(1), help="Score the first so many examples only.")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Examples per forward pass.")
@click.option(
    "--max-length", type=click.IntRange(8), default=1024, show_default=True, help="Longest example in tokens."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    references: tuple[str, ...],
    data: Path,
    task: str | None,
    limit: int | None,
    batch_size: int,
    max_length: int,
    as_json: bool,
) -> None:
    """Score REFERENCES, adapters and bases of one base, on held-out data.

    \b
    qhub eval both smollm2 --data recipes/data/origin.test.jsonl --task origin

    Exact match is the share of answers that greedy decoding writes token for token. Scores of adapters
    are kept: `qhub list` and `qhub show` tell them.
    """
    from adapterhub_local.base.store import find_base, list_bases
    from adapterhub_local.errors import Incompatible

    registry = Registry()
    names = {base.name for base in list_bases(home())}
    versions = {text: None if text in names else registry.resolve(text) for text in references}
    if not data.is_file():
        raise NotFound(f"there is no data file {data}")
    from adapterhub_local.base.load import load_base
    from adapterhub_local.evaluate.run import base_of, entry, read_tests, score
    from adapterhub_local.train.progress import Quiet, Terminal

    bases = {
        find_base(text, home()) if version is None else base_of(version, home()) for text, version in versions.items()
    }
    if len({base.fingerprint for base in bases}) > 1:
        raise Incompatible("these are of several bases: score those of one base at a time")
    from adapterhub_local.train.examples import read_chats

    read_chats(data, limit)  # mistakes are told before the base is loaded
    base = load_base(bases.pop())
    tests = read_tests(base, data, limit, max_length)
    task = task or data.name.partition(".")[0]
    reporter = Terminal() if sys.stderr.isatty() else Quiet()
    results = {}
    for text, version in versions.items():
        with reporter.counting(f"scoring {text}") as progress:
            results[str(version or text)] = scored = score(base, version, tests, batch_size, progress)
        if version is not None:
            registry.add_evaluation(version, task, entry({"adapter": scored}, data))
    if as_json:
        print_json({"task": task, "scores": {name: scored.to_json() for name, scored in results.items()}})
    else:
        rows = [(name, s.rows, f"{s.exact_match:.1%}", f"{s.loss:.4f}") for name, s in results.items()]
        print_table((task, "rows", "exact match", "loss"), rows)
