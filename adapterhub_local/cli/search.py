"""`qhub search`: versions by words, by how well they answer given examples, or by how alike their deltas are."""

from pathlib import Path
from typing import Any

import click

from adapterhub_local.cli.list import entries_of, entries_there, print_entries
from adapterhub_local.cli.output import echo, print_json, print_table, reporter
from adapterhub_local.client import chosen_server
from adapterhub_local.counts import counted
from adapterhub_local.errors import InputError
from adapterhub_local.registry import Registry, Version


@click.command(name="search")
@click.argument("words", nargs=-1)
@click.option("--like", type=click.Path(path_type=Path), metavar="FILE",
              help="Rank adapters by their loss on the examples of this data file, the least first.")  # fmt: skip
@click.option("--similar-to", metavar="REF", help="Rank adapters by the cosine of their deltas with those of REF.")
@click.option("--base", "base_name", metavar="NAME", help="With --like: adapters of this base. Default: the only one.")
@click.option("--examples", type=click.IntRange(1), default=32, show_default=True,
              help="With --like: score at most this many examples.")  # fmt: skip
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="Show at most this many.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    words: tuple[str, ...],
    like: Path | None,
    similar_to: str | None,
    base_name: str | None,
    examples: int,
    limit: int,
    as_json: bool,
) -> None:
    """Find versions with all WORDS in name, description, tags or recipe, the best first (at QHUB_SERVER: by name).

    \b
    qhub search review polarity
    qhub search --like questions.jsonl          which adapter answers these best? The base is among them
    qhub search --similar-to sentiment@3        which adapters change the base in the same direction?

    With --like and --similar-to the newest version of every name is ranked, or of those that have all WORDS.
    """
    if like is not None and similar_to is not None:
        raise InputError("--like and --similar-to exclude each other: give one")
    if base_name is not None and like is None:
        raise InputError("--base is for --like: give it, or `qhub list --base` lists the adapters of a base")
    nothing = f"No version has all of these words: {' '.join(words)}"
    if (server := chosen_server()) is not None:
        if like is not None or similar_to is not None:
            raise InputError("QHUB_SERVER is set, and adapters are ranked on this machine alone: search there by words")
        if not words:
            raise click.MissingParameter(ctx=click.get_current_context(), param_hint="WORDS", param_type="argument")
        print_entries(entries_there(server, limit, q=" ".join(words), versions="all"), as_json, nothing=nothing)
        return
    registry = Registry()
    if like is not None:
        _by_loss(registry, words, like, base_name, examples, limit, as_json)
    elif similar_to is not None:
        _by_similarity(registry, words, similar_to, limit, as_json)
    elif not words:
        raise click.MissingParameter(ctx=click.get_current_context(), param_hint="WORDS", param_type="argument")
    else:
        from adapterhub_local.registry.catalog import search

        versions = search(registry, " ".join(words), limit=limit)
        print_entries(entries_of(registry, versions), as_json, nothing=nothing)


def _by_loss(
    registry: Registry,
    words: tuple[str, ...],
    like: Path,
    base_name: str | None,
    examples: int,
    limit: int,
    as_json: bool,
) -> None:
    from adapterhub_local.base.bases import choose_base
    from adapterhub_local.evaluate.comparison import find_data

    find_data(str(like))  # reports a wrong path before anything heavy is loaded
    info = choose_base(base_name, registry.home, "the search")
    versions = _candidates(registry, words, info.fingerprint)
    from adapterhub_local.base.chat_template import stop_tokens
    from adapterhub_local.base.load import compute_dtype, load_base
    from adapterhub_local.evaluate.ranking import rank_by_loss
    from adapterhub_local.rows.examples import read_chats, tokenise

    chats = read_chats(like, examples)
    base = load_base(info, dtype=compute_dtype())
    tests = tokenise(chats, base.tokenizer, info.max_length or 1024, stops=stop_tokens(info.folder, base.tokenizer))
    ranked = rank_by_loss(base, versions, tests, reporter())[:limit]
    if as_json:
        print_json([
            {"adapter": str(one.version) if one.version else None, "base": info.name, "loss": round(one.loss, 6)}
            for one in ranked
        ])  # fmt: skip
        return
    rows = [(one.version or f"{info.name} (base)", f"{one.loss:.4f}", _description(one.version)) for one in ranked]
    print_table(("adapter", f"loss on {counted(len(tests), 'example')}", "description"), rows)


def _by_similarity(registry: Registry, words: tuple[str, ...], similar_to: str, limit: int, as_json: bool) -> None:
    from adapterhub_local.registry.kinds import check_adapter

    version = check_adapter(registry.resolve(similar_to))
    others = [one for one in _candidates(registry, words, version.base_fingerprint)
              if one.manifest_digest != version.manifest_digest]  # fmt: skip
    from adapterhub_local.merge.similar import rank_by_similarity

    ranked = rank_by_similarity(version, others, lambda one, why: echo(f"note: {one} is left out: {why}", err=True))
    if as_json:
        print_json([{"adapter": str(one.version), "cosine": round(one.cosine, 6)} for one in ranked[:limit]])
        return
    if not ranked:
        echo(f"No other adapter here is for the base of {version}")
        return
    rows = [(one.version, f"{one.cosine:+.4f}", _description(one.version)) for one in ranked[:limit]]
    print_table(("adapter", f"cosine with {version}", "description"), rows)


def _candidates(registry: Registry, words: tuple[str, ...], fingerprint: str | None) -> list[Version]:
    """The newest version of each name on a base, if words are given of those that have them all. No routers."""
    from adapterhub_local.registry.catalog import search
    from adapterhub_local.registry.kinds import is_router

    known = search(registry, " ".join(words), limit=1_000_000) if words else registry.versions()
    newest: dict[str, Version] = {}
    for version in known:
        if version.base_fingerprint == fingerprint and not is_router(version.lineage):
            before = newest.get(version.name)
            newest[version.name] = version if before is None or before.number < version.number else before
    return [newest[name] for name in sorted(newest)]


def _description(version: Version | None) -> Any:
    return version.lineage.get("description") if version is not None else None
