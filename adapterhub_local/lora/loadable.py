"""A folder that PEFT may load: with a config that names just what there is, and no pattern of a stranger in it."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapterhub_local.lora.config import CONFIG, WEIGHTS
from adapterhub_local.lora.contents import read_layout


@contextmanager
def loadable(folder: Path) -> Iterator[Path]:
    """The adapter's folder, or, for as long as the block, one beside it whose config says the same module by module.

    PEFT matches the patterns of a config with Python's `re`, which some patterns keep busy forever, and makes factors
    for all modules that a config names. Raises what `read_layout` raises.
    """
    layout = read_layout(folder, dora=True, tokens=True)
    exact = layout.config.for_modules(layout.shapes)
    if layout.path.name == WEIGHTS and exact == layout.config:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="qhub-") as place:
        made = Path(place)
        try:
            (made / WEIGHTS).symlink_to(layout.path.absolute())
        except OSError:
            shutil.copyfile(layout.path, made / WEIGHTS)
        (made / CONFIG).write_bytes(exact.to_bytes())
        yield made
