"""Ask one tiny server by clients as people install them, and print the table of what passed.

    make check-clients          # installs them into environments of their own first, then calls this

Needs a network for installing alone. docs/clients.md has the table of the last run.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from adapterhub_local.base.add import add_base
from adapterhub_local.base.load import load_base
from adapterhub_local.registry import Registry
from adapterhub_local.settings import home
from tests.serve.adapter_makers import publish
from tests.serve.conftest import Server
from tests.tiny import save_tiny_model

HERE = Path(__file__).parent


def table(rows: list[dict]) -> str:
    """The results as a table of Markdown."""
    lines = ["| client | version | passes | what |", "| --- | --- | --- | --- |"]
    for row in rows:
        mark = "yes" if row["passes"] else "**no**"
        lines.append(f"| {row['client']} | {row['version']} | {mark} | {row['what'].splitlines()[0][:100]} |")
    return "\n".join(lines)


def main(python: str, modules: str, names: list[str]) -> int:
    """Run the clients installed for `python`, and those in the folder `modules` of npm; how many failed."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["QHUB_HOME"] = folder
        base = add_base(
            "tiny", save_tiny_model(Path(folder) / "model", max_position_embeddings=4096), home(), hub_id="someone/tiny"
        )
        registry = Registry(home())
        publish(registry, "alpha", base, seed=1)
        server = Server(load_base(base, device="cpu"), registry)
        commands = [[python, str(HERE / "python_clients.py"), server.url, *names]]
        if modules:
            script = Path(modules) / "npm_clients.mjs"  # modules are found from where a script lies
            script.write_text((HERE / "npm_clients.mjs").read_text())
            commands.append(["node", str(script), server.url, *names])
        rows = []
        try:
            for command in commands:
                with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                    for line in process.stdout:
                        if line.startswith('{"client":'):
                            rows.append(json.loads(line))
                            sys.stderr.write(line)
        finally:
            server.stop()
    sys.stdout.write(f"{table(rows)}\n")
    return sum(not row["passes"] for row in rows) + (not rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
