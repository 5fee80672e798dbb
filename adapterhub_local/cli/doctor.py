"""`qhub doctor`: what is here, what is missing, what is slow, and how to fix it."""

import dataclasses
import subprocess
import sys

import click

from adapterhub_local.cli.output import echo, print_json, print_table
from adapterhub_local.doctor import Finding, examine
from adapterhub_local.errors import QhubError
from adapterhub_local.settings import home

# in a process of its own: what torch and a compiled library do wrong ends that process only
_DEEP = """
import logging, torch
logging.disable()
from serve.kernels.choose import choose_kernels
has_gpu = torch.cuda.is_available()
kernels = choose_kernels("auto", torch.device("cuda" if has_gpu else "cpu"), torch.float32, (4, 2, 32))
print(torch.cuda.get_device_name() if has_gpu else "cpu", *(kernels.names if kernels else ()), sep=chr(9))
"""


@click.command(name="doctor")
@click.option("--deep", is_flag=True, help="Also load torch, and check the kernels against it.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(deep: bool, as_json: bool) -> None:
    """Look at everything that qhub needs: packages, compiler, kernels, GPU, home, disk, bases. Exits 1 if it is broken.

    What is missing is optional, what is slow works; each is shown with its fix.
    """
    found = examine(home())
    found += _kernels(deep)
    if as_json:
        print_json([dataclasses.asdict(one) for one in found])
    else:
        print_table(("about", "state", "what", "fix"), [(one.about, one.state, one.what, one.fix) for one in found])
    broken = [one.about for one in found if one.state == "broken"]
    if broken:
        raise QhubError(f"{', '.join(broken)} {'is' if len(broken) == 1 else 'are'} broken")
    if not as_json:
        echo("Nothing is broken.")


def _kernels(deep: bool) -> list[Finding]:
    from serve.kernels.compiled import CannotCompile, built_library, find_compiler

    try:
        compiler = find_compiler()
    except CannotCompile as error:
        return [
            Finding(
                "compiler", "slow", f"{error}: plain torch computes the same, more slowly", "apt install gcc libc6-dev"
            )
        ]
    found = [Finding("compiler", "ok", compiler[0])]
    library = built_library(compiler)
    what = f"compiled at {library}" if library is not None else "not compiled yet: the first `qhub serve` does it"
    found.append(Finding("kernels", "ok", what))
    if deep:
        found.append(_checked())
    return found


def _checked() -> Finding:
    """The kernels, run and compared with torch."""
    done = subprocess.run([sys.executable, "-c", _DEEP], capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        return Finding("torch", "broken", last[:300], "reinstall torch, as https://pytorch.org says for this machine")
    where, *names = done.stdout.strip().split("\t")
    if not names:
        return Finding(
            "kernels checked", "slow", f"none is used on {where}: plain torch computes the same, more slowly"
        )
    return Finding("kernels checked", "ok", f"{', '.join(names)} agree with torch on {where}")
