"""Recipes: what is wrong is told with file, line and the nearest key, all of it at once."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapterhub_local.errors import BadRecipe, NotFound
from adapterhub_local.recipe import Recipe, load_recipe
from adapterhub_local.recipe.schema import TABLES

MINIMAL = '[base]\nname = "tiny"\n\n[data]\ntrain = "train.jsonl"\n\n[output]\nname = "sentiment"\n'
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a recipe beside a training and a test file, and returns its path."""
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "test.jsonl").write_text("{}\n")

    def to_file(text: str) -> Path:
        path = tmp_path / "recipe.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return to_file


def problems(path: Path, *overrides: str) -> list[str]:
    """The lines of the error that this recipe gives, without its path."""
    with pytest.raises(BadRecipe) as caught:
        load_recipe(path, overrides)
    return [line.removeprefix(str(path)) for line in str(caught.value).splitlines()]


def test_a_minimal_recipe_has_defaults_for_all_else(write: Write) -> None:
    """Base, training data and output name are enough; data files are found beside the recipe."""
    recipe = load_recipe(write(MINIMAL))
    assert recipe.data.train == recipe.path.parent / "train.jsonl"
    assert recipe.adapter.target_modules == "all-linear"
    assert recipe.task == "sentiment"
    assert recipe.text == MINIMAL
    assert str(recipe.path.parent) not in str(recipe.to_json())


def test_an_empty_recipe_is_told_everything_it_needs(write: Write) -> None:
    """Each required key that is missing is one line with its meaning."""
    lines = problems(write(""))
    assert [line.split("needs ")[1].split(":")[0] for line in lines] == ["'name'", "'train'", "'name'"]


def test_all_mistakes_are_told_at_once_each_with_its_line(write: Write) -> None:
    """One run of a recipe with six mistakes names all six, with their lines and the nearest keys."""
    text = (
        '[base]\nname = "Tiny"\n'  # 2
        '[data]\ntrian = "train.jsonl"\n'  # 4, and [data] needs train: 3
        "[train]\nepochs = true\nlearning_rte = 1e-3\n"  # 6, 7
        '[output]\nname = "x"\n[trainn]\nseed = 1\n'  # 10
    )
    lines = problems(write(text))
    assert sorted(int(line.split(":")[1]) for line in lines) == [2, 3, 4, 6, 7, 10]
    told = "\n".join(lines)
    for near in ("did you mean 'train'?", "did you mean 'learning_rate'?"):
        assert near in told
    assert "unknown table [trainn]" in told


WRONG = {  # a line of a table -> what is told
    "train: epochs = 0": "must be a positive number",
    "train: epochs = nan": "must be a number",
    "train: epochs = inf": "must be a number",
    f"train: epochs = 1{'0' * 400}": "must be a number",
    "train: epochs = '1'": "must be a number, not '1'",
    "train: batch_size = 0": "must be 1 or more",
    "train: batch_size = 1.5": "must be a whole number",
    "train: batch_size = true": "must be a whole number",
    "train: micro_batch_size = 3": "must divide batch_size (16)",
    "train: learning_rate = -1e-3": "must be from 0 to 1",
    "train: schedule = 'cosin'": "must be one of cosine, linear, constant",
    "train: optimizer = 'sgd'": "paged_adamw_8bit, paged_adamw_32bit",
    "train: compute = 'float16'": "must be one of auto, float32, bfloat16",
    "train: warmup = 1.01": "must be from 0 to 1",
    "train: seed = -1": "must be 0 or more",
    "train: seed = 4294967296": "must be 0 or more",
    "train: max_grad_norm = 0": "must be a positive number",
    "adapter: rank = 0": "must be from 1 to 4096",
    "adapter: alpha = 0": "must be a positive number",
    "adapter: dropout = 1": "must be from 0 to 0.99",
    "adapter: rslora = 1": "must be true or false",
    "adapter: target_modules = []": "must be 'all-linear' or a list",
    "adapter: target_modules = ''": "must be 'all-linear' or a list",
    "adapter: target_modules = 'q_proj'": "must be 'all-linear' or a list",
    "adapter: target_modules = ['q_proj', 3]": "must be text or a list of names",
    "adapter: target_modules = ['']": "must be text or a list of names",
    "data: max_length = 7": "must be 8 or more",
    "data: limit = 0": "must be 1 or more",
    "data: test = 'train.jsonl'": "hold out other examples",
    "data: test = 'none.jsonl'": "there is no file",
    "data: test = '~nobody-here/x.jsonl'": "there is no file",
    f"data: test = '{'x' * 5000}'": "there is no file",
    "data: test = ''": "must be a file name",
    "data: test = 3": "must be a file name",
    "eval: limit = -1": "must be 1 or more",
    "output: alias = 'latest'": "reserved",
    "output: alias = 'v3'": "reserved",
    "output: alias = 'a/b'": "not an alias",
    "output: task = 3": "must be text",
}


@pytest.mark.parametrize(("line", "told"), WRONG.items(), ids=[line[:40] for line in WRONG])
def test_a_wrong_value_is_told_with_its_line(write: Write, line: str, told: str) -> None:
    """A wrong type or a value out of its limits is one line that names file, line, key and what is allowed."""
    table, _, assignment = line.partition(": ")
    key = assignment.split(" =")[0]
    text = MINIMAL.replace(f"[{table}]\n", f"[{table}]\n{assignment}\n")
    if text == MINIMAL:
        text += f"[{table}]\n{assignment}\n"
    number = text.splitlines().index(assignment) + 1
    (problem,) = problems(write(text))
    assert problem.startswith(f":{number}: ")
    assert told in problem
    assert key in problem


@pytest.mark.parametrize("table", TABLES)
def test_an_unknown_key_of_any_table_names_the_nearest(write: Write, table: str) -> None:
    """A key with a letter doubled is answered with the key that was meant, in every table."""
    key = fields(TABLES[table])[0].name
    text = MINIMAL + ("" if f"[{table}]" in MINIMAL else f"[{table}]\n")
    text = text.replace(f"[{table}]\n", f"[{table}]\n{key}{key[-1]} = 1\n")
    (problem,) = problems(write(text))
    line = text.splitlines().index(f"{key}{key[-1]} = 1") + 1
    assert problem == f":{line}: unknown key '{key}{key[-1]}' in [{table}]: did you mean '{key}'?"


@pytest.mark.parametrize("text", ["seed = 1\n", "train = 3\n", "[[train]]\nseed = 1\n", "[train.extra]\nx = 1\n"])
def test_what_is_no_table_of_a_recipe_is_refused(write: Write, text: str) -> None:
    """Keys outside tables, tables written as values, lists of tables and tables in tables are problems, with a line."""
    minimal = text + MINIMAL if text.startswith(("seed", "train =")) else MINIMAL + text
    (problem,) = problems(write(minimal))
    assert problem.startswith(":")


@pytest.mark.parametrize(
    "text", ["[base", "name = ", 'a = "x', "a = 1\na = 2", "[base]\n[base]", "x = [" * 2000, "x = " + "1" * 5000]
)
def test_what_is_not_toml_is_refused(write: Write, text: str) -> None:
    """Text that TOML does not allow, or that is too deep or too long to read, is one problem."""
    (problem,) = problems(write(text))
    assert problem.startswith(": not TOML")


def test_files_that_cannot_be_read(write: Write, tmp_path: Path) -> None:
    """A recipe that is missing, a folder, or not UTF-8 is told as such."""
    with pytest.raises(NotFound, match="there is no recipe"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(BadRecipe, match="cannot be read as text"):
        load_recipe(tmp_path)
    path = write("")
    path.write_bytes(b"\xff\xfe[base]")
    with pytest.raises(BadRecipe, match="cannot be read as text"):
        load_recipe(path)


def test_overrides_change_keys(write: Write) -> None:
    """`table.key=value` sets any key, with a TOML value or plain text, also in tables the recipe does not have."""
    recipe = load_recipe(
        write(MINIMAL),
        [
            *("train.seed=7", "train.optimizer=adamw", "adapter.target_modules=['q_proj']", "output.name='b'"),
            *("data.test=test.jsonl", "eval.limit = 5", "output.description=a=b, c", "train.learning_rate=1"),
        ],
    )
    assert (recipe.train.seed, recipe.train.optimizer, recipe.train.learning_rate) == (7, "adamw", 1.0)
    assert recipe.adapter.target_modules == ("q_proj",)
    assert (recipe.output.name, recipe.output.description) == ("b", "a=b, c")
    assert recipe.data.test == recipe.path.parent / "test.jsonl"
    assert recipe.eval.limit == 5


WRONG_OVERRIDES = [
    *("", "seed=1", "train.seed", "train.=1", "train.sed=1", "trian.seed=1", "train.seed=x", "train.seed="),
    *("data.train=none.jsonl", "train.seed=" + "1" * 5000, "train.a.b=1", "x=[" * 500),
]


@pytest.mark.parametrize("override", WRONG_OVERRIDES, ids=lambda text: text[:24])
def test_wrong_overrides_are_refused(write: Write, override: str) -> None:
    """An override of a key that does not exist, or with a value that is not allowed, is a problem too."""
    assert len(problems(write(MINIMAL), override)) == 1


def test_every_key_says_what_it_means() -> None:
    """Each field of each table carries its meaning, from which the reference is written."""
    for table in TABLES.values():
        for item in fields(table):
            assert len(item.metadata["meaning"]) > 5, (table, item.name)
    assert list(TABLES) == [item.name for item in fields(Recipe)][: len(TABLES)]


def test_shipped_recipes_load() -> None:
    """Every recipe that is shipped is valid, has its data, and names its command in its header."""
    folder = Path(__file__).parents[1] / "recipes"
    paths = sorted(folder.rglob("*.toml"))
    assert len(paths) >= 2
    for path in paths:
        recipe = load_recipe(path)
        assert recipe.data.test is not None
        assert recipe.output.description
        assert f"qhub train {path.relative_to(folder.parent)}" in recipe.text


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.text(st.sampled_from(list("[]\"'=.#{},\n\\ abtrainame1e-")), max_size=60))
def test_any_text_is_a_recipe_or_refused(write: Write, text: str) -> None:
    """No text makes reading a recipe end in anything but BadRecipe with lines that name the file."""
    path = write(text)
    for line in problems(path):
        assert line.startswith(":")
