"""`qhub`: the verbs by name, loaded when called, and the one place where an error becomes an exit code."""

import difflib
import errno
import gc
import importlib
import io
import os
import signal
import sys
import threading
from typing import Any

import click

from adapterhub_local.cli.output import echo
from adapterhub_local.client import check_here
from adapterhub_local.errors import QhubError
from adapterhub_local.noise import hush
from adapterhub_local.settings import is_in_home

# section of the help -> verb -> what it does; the module of that name is imported when the verb is called
SECTIONS = {
    "Bases": {
        "base": "Add, list and show the shared 4-bit bases.",
    },
    "Training": {
        "recipe": "Write, check and explain recipes.",
        "data": "Show what a recipe's data teaches, token by token.",
        "plan": "Estimate what a recipe takes: memory, time, and whether it fits.",
        "train": "Train an adapter from a recipe and register it as a version.",
        "runs": "List training runs, show how one went, remove them.",
        "eval": "Score an adapter or a base on held-out data.",
    },
    "Merging": {
        "merge": "Merge adapters into one: exact sum, rank reduction, TIES and others.",
        "try-merges": "Compare what several merges answer to held-out examples; keep none.",
        "tune-merge": "Search the merge that does best on held-out data: weights, layers, methods.",
        "extract": "Make a LoRA from the difference of two full models.",
    },
    "Versions": {
        "list": "List the adapters and their newest versions.",
        "search": "Find versions by words in names, descriptions, tags and recipes.",
        "show": "Show one version: files, lineage, metrics.",
        "lineage": "Show what a version was made of, as a tree or a graph.",
        "diff": "Compare two versions: recipe, data, metrics and deltas.",
        "path": "Print a folder with a version's files, which PEFT loads.",
        "alias": "Point names such as prod to versions.",
        "approve": "Approve a version for a protected alias.",
        "history": "Show everything that changed, and who changed it.",
        "tag": "Give a version tags, to find it by.",
        "describe": "Describe a version in one line.",
        "add": "Register an adapter trained elsewhere.",
        "rm": "Remove versions; their numbers are not reused.",
    },
    "Serving": {
        "router": "Learn which adapter a prompt is for; `auto` then chooses.",
        "serve": "Serve a base and all its adapters, OpenAI-compatible.",
        "cluster": "Serve a base on several replicas behind one address, on Ray.",
        "console": "Look at adapters, compare, try and merge them in a browser.",
        "chat": "Talk to a running server; change the adapter in mid-conversation.",
        "key": "Make, list and revoke the server's API keys.",
    },
    "Sharing": {
        "push": "Push a version to the Hugging Face Hub, or to an OCI registry (oci://).",
        "pull": "Pull an adapter from the Hugging Face Hub, or from an OCI registry (oci://).",
        "search-hub": "Find adapters on the Hugging Face Hub.",
        "outdated": "Show which pulled adapters are newer on the Hub.",
        "export": "Write a version for other tools: one file, PEFT, GGUF, fused, Ollama, or a tar.",
        "import": "Register the versions of such a tar.",
        "remote": "Name places that keep versions for several homes: a folder, S3.",
        "sync": "Push versions to a remote, or pull them from it.",
        "sign": "Sign a version with a key; `verify --key` checks it.",
        "attest": "Sign where a version comes from; or write its bill of materials.",
    },
    "Care": {
        "doctor": "Report what is here, missing or slow, and how to fix it.",
        "verify": "Hash the files of versions again; explain what they were made of.",
        "fsck": "Check the whole registry, repair it, or make its database again.",
        "gc": "Free the space that no version needs; with --keep, remove old versions first.",
        "hook": "Have a command or a URL notified of changes.",
        "completion": "Have the shell complete verbs and options.",
    },
}
FULL = (
    "stop what else uses it, or ask for less: `qhub plan` estimates what training takes, `qhub serve` has --kv-cache, "
    "--base-cache and --max-length; QHUB_DEVICE=cpu leaves the GPU alone"
)
# those that go to the server that QHUB_SERVER names, and those that concern this machine whatever it names
THERE = (
    "list", "search", "show", "lineage", "diff", "alias", "approve", "history", "tag", "describe", "runs", "base",
)  # fmt: skip
EITHER = ("chat", "completion", "doctor", "recipe")
VERBS = [verb for section in SECTIONS.values() for verb in section]


class Verbs(click.Group):
    """A group whose commands are imported on demand, so that `qhub --help` loads none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return VERBS

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], VERBS, n=1)
            hint = f": did you mean '{near[0]}'?" if near else ""
            raise click.UsageError(f"there is no command '{args[0]}'{hint}", ctx)
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        if cmd_name not in (*THERE, *EITHER) and not ctx.resilient_parsing:
            check_here(cmd_name)
        verb: click.Command = importlib.import_module(f"adapterhub_local.cli.{cmd_name.replace('-', '_')}").command
        return verb

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, verbs in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl(list(verbs.items()))


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="adapterhub-local", prog_name="qhub")
def qhub() -> None:
    """Train, version, merge, serve and publish LoRA adapters over one shared 4-bit base.

    \b
    qhub base add smollm2 HuggingFaceTB/SmolLM2-135M-Instruct
    qhub train recipe.toml
    qhub serve
    """


def run(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 bad usage or input, 1 failure, 130 stopped by the user."""
    gc.set_threshold(20_000)  # imports make a million objects that stay: to look through them takes a fifth of a start
    hush()
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed: `qhub list >&-`
            setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115 - to the end of the process
    interrupts = _count_interrupts()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that lacks a letter shows its code instead of failing
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = qhub.main(args=arguments, prog_name="qhub", standalone_mode=False)
    except QhubError as error:
        _fail(str(error), error.exit_code)
    except click.exceptions.Abort:
        _fail("stopped", 130)
    except click.exceptions.NoArgsIsHelpError as error:
        echo(error.format_message(), err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        where = getattr(error, "ctx", None)
        hint = f" (see `{where.command_path} --help`)" if where else ""
        _fail(error.format_message().replace("\n", " ") + hint, error.exit_code)
    except KeyboardInterrupt:
        _fail("stopped", 130)
    except BrokenPipeError:  # the reader of our output has gone: `qhub list | head -1`
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        is_closed = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and is_in_home(error.filename)
        hint = ": the home cannot be written, set QHUB_HOME to a folder that can" if is_closed else ""
        _fail(f"{error.strerror or error}{where}{hint}", 1)
    except Exception as error:
        if interrupts:  # an import that is cut in the middle raises errors of its own
            _fail("stopped", 130)
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not to be loaded for this
            raise
        _fail(f"the GPU's memory is full ({first_sentences(error)}): {FULL}", 1)
    sys.exit(code if isinstance(code, int) else 0)


def first_sentences(error: Exception) -> str:
    """What torch says was asked for and free, without its advice about the allocator."""
    return ". ".join(str(error).split(". ")[:3])


def _count_interrupts() -> list[int]:
    """A list that grows by one with each Ctrl-C, which else does what it does."""
    seen: list[int] = []

    def interrupt(number: int, frame: Any) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    if (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
        and threading.current_thread() is threading.main_thread()
    ):
        signal.signal(signal.SIGINT, interrupt)
    return seen


def _fail(message: str, code: int) -> None:
    for line in message.strip("\n").split("\n"):  # the mistakes of a recipe come a line each
        echo(f"qhub: {line}", err=True)
    sys.exit(code)
