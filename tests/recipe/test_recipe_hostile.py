"""TOML that nobody meant well: refused in a moment, with one reason, whatever it holds and wherever its names lead."""

import os
from pathlib import Path

import pytest

from adapterhub_local.errors import BadRecipe, QhubError
from adapterhub_local.merge.plan_file import load_plan
from adapterhub_local.recipe import load_recipe
from adapterhub_local.recipe.toml import MAX_BYTES, MAX_PROBLEMS, Places
from adapterhub_local.regular import open_regular, read_regular
from tests.patience import ends

SIZE = MAX_BYTES - 50
DEEP = "a." * 18 + "a"
HOSTILE: dict[str, tuple[str, str]] = {  # name -> lines of a recipe or a plan, a part of the message
    "arrays": ("a = " + "[" * (SIZE - 10), "nested too deeply"),
    "inline tables": ("a = " + "{a=" * (SIZE // 3 - 10), "nested too deeply"),
    "dotted key": ("a." * (SIZE // 2 - 10) + "a = 1", "key of more than 20 parts"),
    "quoted key": ('"a".' * (SIZE // 4 - 10) + "a = 1", "key of more than 20 parts"),
    "spaced key": ("a . " * (SIZE // 4 - 10) + "a = 1", "key of more than 20 parts"),
    "deep keys": ("\n".join(f"b{number}.{DEEP} = 1" for number in range(5000)), "unknown table"),
    "deep tables": ("\n".join(f"[b{number}.{DEEP}]" for number in range(5000)), "unknown table"),
    "tables": ("\n".join(f"[t{number}]" for number in range(25_000)), "unknown table"),
    "one table": ("[[train]]\n" * 20_000, "'train' must be a table|unknown table"),
    "unknown keys": ("[train]\n" + "\n".join(f"key_{number} = 1" for number in range(15_000)), "unknown (key|table)"),
    "typos": ("[train]\n" + "\n".join(f"learning_rat{number} = 1" for number in range(3000)), "unknown (key|table)"),
    "bracket": ("[" + " " * (SIZE - 10), "not TOML"),
    "spaces": (" " * (SIZE - 10) + "a", "not TOML"),
    "long key": ("a" * (SIZE - 10) + " = 1", "unknown table"),
    "long value": ('[train]\nepochs = "' + "x" * (SIZE - 50) + '"', "epochs|unknown table"),
    "digits": ("a = " + "1" * (SIZE - 10), "4300 digits"),
    "exponent": ("a = 1e" + "1" * (SIZE - 10), "unknown table"),
    "escapes": ('a = """' + "\\\n   " * (SIZE // 5 - 10) + '"""', "unknown table"),
    "quotes": ("\"'" * (SIZE // 2 - 10), "not TOML"),
    "dashes": ("a-" * (SIZE // 2 - 10), "not TOML"),
    "large": ("#" * (5 << 20), "more than 262,144 bytes"),
    "sweep": ("[sweep.grid]\n" + "\n".join(
        f"train.{key} = [{','.join(['1'] * 2000)}]" for key in ("epochs", "seed", "learning_rate", "batch_size")),
        "sweep"),
}  # fmt: skip


@pytest.mark.parametrize("load", [load_recipe, load_plan])
@pytest.mark.parametrize(("text", "words"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_toml_is_refused_in_a_moment(text: str, words: str, load, tmp_path: Path) -> None:
    """Deep, long, many: a sentence a mistake, no more than anybody reads, after work in proportion to the size."""
    path = tmp_path / "r.toml"
    path.write_text(text)
    with ends(), pytest.raises(BadRecipe, match=words) as caught:
        load(path)
    assert caught.value.exit_code == 2
    lines = str(caught.value).splitlines()
    assert len(lines) <= MAX_PROBLEMS + 1
    assert max(map(len, lines)) < 400 + 3 * len(str(path))


@pytest.mark.parametrize("load", [load_recipe, load_plan])
@pytest.mark.parametrize("kind", ["device", "pipe", "folder"])
def test_only_files_are_read(kind: str, load, tmp_path: Path) -> None:
    """A device without end and a pipe without a writer are refused at once, by their own name and by `extends`."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    path = {"device": Path("/dev/zero"), "pipe": pipe, "folder": tmp_path}[kind]
    reason = "Is a directory" if kind == "folder" else "it is a device or a pipe, not a file"
    with pytest.raises(BadRecipe, match=reason):
        load(path)
    if load is load_recipe:
        child = tmp_path / "child.toml"
        child.write_text(f'extends = "{path}"\n')
        with pytest.raises(BadRecipe, match=rf"child.toml:1: extends: .*{reason}"):
            load(child)


@pytest.mark.parametrize("name", ["/dev/zero", "pipe.jsonl"])
def test_data_are_files(name: str, tmp_path: Path) -> None:
    """A recipe's data may be neither a device nor a pipe, and the message says so."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    path = tmp_path / "r.toml"
    path.write_text(f'[base]\nname = "b"\n[data]\ntrain = "{name}"\n[output]\nname = "x"\n')
    with pytest.raises(BadRecipe, match="is a device or a pipe, not a file"):
        load_recipe(path)


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.jsonl.gz", "x.safetensors"])
def test_readers_of_files_do_not_wait(name: str, tmp_path: Path) -> None:
    """Rows and headers are read from files only: a pipe is refused although nobody writes to it."""
    from adapterhub_local.data.files import read_rows
    from adapterhub_local.lora.header import read_header

    os.mkfifo(tmp_path / name)
    with pytest.raises(QhubError, match="a device or a pipe"):
        read_header(tmp_path / name) if name.endswith("safetensors") else list(read_rows(tmp_path / name))


def test_regular_files_are_read(tmp_path: Path) -> None:
    """A file, also through a link, is read as ever; one that is too long says how much it may have."""
    path, link = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"12345")
    link.symlink_to(path)
    with open_regular(link) as file:
        assert file.read() == b"12345"
    assert read_regular(path, 5) == b"12345"
    with pytest.raises(OSError, match="more than 4 bytes"):
        read_regular(path, 4)


def test_places_of_keys_and_tables() -> None:
    """Lines of keys, of tables of one name, of tables inside others, and of what stands before all."""
    own = ["extends = 'x'", "train.seed = 1", "[data]", "train = 1"]
    places = Places.of([*own, "[[adapter]]", "w = 1", "[[adapter]]", "w = 2", "[sweep.grid]", "a.b = 1"])
    assert [places.line(*asked) for asked in (("extends", None), ("train", "seed"), ("train", None))] == [1, 2, 2]
    assert [places.line("data", key) for key in ("train", None, "none")] == [4, 3, 3]
    assert [places.line("sweep", key) for key in (None, "grid", "grid.a", "grid.a.b")] == [9, 9, 10, 10]
    assert [places.own["adapter", index, "w"] for index in range(2)] == [6, 8]
    assert places.line("none", "x") is None
