"""A merge plan to be tuned: an adapter that was trained, one that is noise, and held-out chats beside it."""

from pathlib import Path

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.recipe import load_recipe
from adapterhub_local.settings import Home
from adapterhub_local.train.train import train
from tests.chats import write_chats, write_recipe
from tests.cli.test_cli import save_adapter


def write_plan(text: str, chats: dict[str, tuple[int, int]], base: BaseInfo, home: Home, folder: Path) -> Path:
    """`plan.toml` with `text`, `yes-no` trained and `noise.safetensors` made; chats: file -> how many, and offset."""
    train(load_recipe(write_recipe(folder), ["train.epochs=4"]), home)
    save_adapter(folder / "noise.safetensors", base.fingerprint)
    for name, (count, offset) in chats.items():
        write_chats(folder / name, count, offset)
    (folder / "plan.toml").write_text(text)
    return folder / "plan.toml"
