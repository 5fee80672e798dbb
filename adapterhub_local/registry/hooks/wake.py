"""After a change: start a process that notifies the hooks. The change does not wait, and does not fail with it."""

import subprocess
import sys
import threading
from contextlib import suppress

from adapterhub_local.errors import QhubError
from adapterhub_local.registry.config import read_config
from adapterhub_local.settings import Home, environment_in


def wake(home: Home) -> None:
    """Have the hooks of a home notified of what they do not know yet, in a process of its own, if it has hooks."""
    with suppress(QhubError, OSError):  # what is not delivered now is at the next change, or by `qhub hook deliver`
        if not home.config.exists() or not read_config(home).hooks:
            return
        process = subprocess.Popen(
            [sys.executable, "-m", "adapterhub_local", "hook", "deliver", "--quiet"], env=environment_in(home),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        threading.Thread(target=process.wait, name="hooks", daemon=True).start()  # or a server would keep zombies
