"""`qhub search-hub`: adapters on the Hugging Face Hub."""

from dataclasses import asdict

import click

from adapterhub_local.cli.output import echo, print_json, print_table


@click.command(name="search-hub")
@click.argument("words", nargs=-1)
@click.option("--base", metavar="ORG/MODEL", help="Those made for this base.")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="Show at most this many.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(words: tuple[str, ...], base: str | None, limit: int, as_json: bool) -> None:
    """Find PEFT adapters on the Hub whose id has WORDS in it, most downloaded first.

    \b
    qhub search-hub sentiment --base HuggingFaceTB/SmolLM2-135M-Instruct
    """
    from adapterhub_local.hub import search_hub

    found = search_hub(" ".join(words), base=base, limit=limit)
    if as_json:
        print_json([asdict(one) for one in found])
    elif not found:
        echo("No adapter on the Hub matches")
    else:
        rows = [
            (one.repo_id, one.base, one.downloads, one.likes, one.updated, "yes" if one.from_qhub else "")
            for one in found
        ]
        print_table(("repository", "base", "downloads", "likes", "updated", "qhub"), rows)
