"""`qhub completion`: the shell completes verbs, options and their values."""

from pathlib import Path

import click
from click.shell_completion import get_completion_class

from adapterhub_local.cli.output import echo
from adapterhub_local.durable import replacing
from adapterhub_local.errors import InputError, QhubError
from adapterhub_local.settings import config_folder, data_folder

SHELLS = ("bash", "zsh", "fish")


@click.command(name="completion")
@click.argument("shell", type=click.Choice(SHELLS))
@click.option("--install", is_flag=True, help="Write it where the shell looks, instead of printing it.")
def command(shell: str, install: bool) -> None:
    """Print the completion of qhub for a shell, or install it for this user.

    \b
    qhub completion bash --install
    eval "$(qhub completion zsh)"
    """
    text = script(shell)
    if not install:
        echo(text)
        return
    path = place(shell)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as staged:
            staged.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}): print it and put it where {shell} looks"
        ) from None
    echo(f"{path}: new shells complete qhub")
    if shell == "zsh":
        echo(
            f"if ~/.zshrc does not have it yet: fpath=({path.parent} $fpath); autoload -Uz compinit; compinit", err=True
        )


def script(shell: str) -> str:
    """What the shell reads. Raises QhubError for a bash that is too old."""
    from adapterhub_local.cli.main import qhub

    kind = get_completion_class(shell)
    assert kind is not None, "click knows the three"
    try:
        return kind(qhub, {}, "qhub", "_QHUB_COMPLETE").source()
    except RuntimeError as error:
        raise QhubError(str(error)) from None


def place(shell: str) -> Path:
    """Where the shell looks for what a user has installed."""
    match shell:
        case "bash":
            return data_folder() / "bash-completion" / "completions" / "qhub"
        case "zsh":
            return data_folder() / "zsh" / "site-functions" / "_qhub"
    return config_folder() / "fish" / "completions" / "qhub.fish"
