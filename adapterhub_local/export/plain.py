"""A version's own files: the weights alone, which carry their config, or the folder that PEFT loads. No torch."""

import shutil
from pathlib import Path

from adapterhub_local.durable import place_file, place_folder, staging
from adapterhub_local.export.formats import Request, Written
from adapterhub_local.lora.config import WEIGHTS


def write_file(request: Request) -> Written:
    """The weights as one self-describing file."""
    with staging(request.target.absolute().parent, prefix=".qhub-") as stage:
        shutil.copyfile(request.version.path / WEIGHTS, stage / WEIGHTS)
        place_file(stage / WEIGHTS, request.target)
    return Written()


def write_peft(request: Request) -> Written:
    """All files of the version as a folder."""
    with staging(request.target.absolute().parent, prefix=".qhub-") as stage:
        place_folder(Path(shutil.copytree(request.version.path, stage / "adapter")), request.target)
    return Written()
