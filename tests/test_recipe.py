"""Recipes: what is wrong is told with file, line and the nearest key, all of it at once."""

import re
import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import fastjsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapterhub_local.errors import BadRecipe, NotFound
from adapterhub_local.recipe import Recipe, load_recipe
from adapterhub_local.recipe.schema import TABLES
from adapterhub_local.recipe.schema_json import json_schema
from adapterhub_local.recipe.source import HubFiles, read_source
from adapterhub_local.recipe.write import resolved, resolved_text, starter

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
    assert recipe.data.train == (recipe.path.parent / "train.jsonl",)
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
    assert recipe.data.test == (recipe.path.parent / "test.jsonl",)
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
    assert len(paths) >= 5
    for path in paths:
        recipe = load_recipe(path)
        assert recipe.data.test is not None
        assert recipe.output.description
        assert f"qhub train {path.relative_to(folder.parent)}" in recipe.text


# -- extends, sweep, show, init, schema --------------------------------------------------------------

WIDE = MINIMAL + "[train]\nseed = 3\nepochs = 2\n"


def test_a_recipe_extends_others(write: Write, tmp_path: Path) -> None:
    """The nearer recipe wins; each value says where it is written; paths are seen from the file that names them."""
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "x.jsonl").write_text("{}\n")
    (tmp_path / "far" / "far.toml").write_text(WIDE.replace("train.jsonl", "x.jsonl"))
    (tmp_path / "middle.toml").write_text('extends = "far/far.toml"\n[train]\nseed = 4\nbatch_size = 2\n')
    recipe = load_recipe(write('extends = "middle.toml"\n\n[train]\nseed = 5\n'), ["train.warmup=0"])
    shown = resolved(recipe)

    assert (recipe.train.seed, recipe.train.batch_size, recipe.train.epochs, recipe.train.warmup) == (5, 2, 2, 0)
    assert recipe.data.train == (tmp_path / "far" / "x.jsonl",)
    assert recipe.text.startswith("extends")
    assert recipe.text.index("# middle.toml, which is extended\n") < recipe.text.index(
        "# far.toml, which is extended\n"
    )
    assert shown["train"]["seed"] == {"value": 5, "from": f"{recipe.path}:4"}
    assert shown["train"]["batch_size"]["from"] == f"{tmp_path / 'middle.toml'}:4"
    assert shown["base"]["name"] == {"value": "tiny", "from": f"{tmp_path / 'far/far.toml'}:2"}
    assert (shown["train"]["warmup"]["from"], shown["train"]["schedule"]["from"]) == ("--set", "default")
    assert load_recipe(write(resolved_text(recipe).replace("x.jsonl", "train.jsonl"))).to_json() == {
        **recipe.to_json(),
        "data": {**recipe.to_json()["data"], "train": "train.jsonl"},
    }


def test_mistakes_of_extended_recipes_name_their_file(write: Write, tmp_path: Path) -> None:
    """A mistake is told with the file and line where it is written, whichever of the recipes that is."""
    (tmp_path / "other.toml").write_text(MINIMAL.replace('name = "tiny"', 'nam = "tiny"'))
    with pytest.raises(BadRecipe) as caught:
        load_recipe(write('extends = "other.toml"\n[train]\nsed = 1\n'), ["train.epochs=0"])
    lines = str(caught.value).splitlines()

    assert lines[0].startswith(f"{tmp_path / 'other.toml'}:2: unknown key 'nam'")
    assert lines[1].startswith(f"{tmp_path / 'other.toml'}:1: [base] needs 'name'")
    assert lines[2].startswith(f"{tmp_path / 'recipe.toml'}:3: unknown key 'sed'")
    assert lines[3].startswith(f"{tmp_path / 'recipe.toml'}: --set: train.epochs = 0: must be a positive number")
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('extends = "recipe.toml"\n', ":1: recipes extend each other: recipe.toml > recipe.toml"),
        ('\nextends = "none.toml"\n', ":2: extends: there is no recipe"),
        ('extends = "~nobody-here/x.toml"\n', ":1: extends: there is no recipe"),
        (f'extends = "{"x" * 5000}"\n', ":1: extends: "),
        ('extends = "a\\u0000b"\n', ":1: extends: "),
        ('extends = "."\n', ":1: extends: "),
        ("extends = 3\n", ":1: extends must be the name of another recipe"),
        ('extends = ["a.toml"]\n', ":1: extends must be the name of another recipe"),
    ],
)
def test_wrong_extends(write: Write, text: str, told: str) -> None:
    """A recipe that extends itself, nothing, or a list is refused with its line."""
    (problem,) = problems(write(text + MINIMAL))
    assert problem.startswith(told)


def test_a_circle_of_three_is_found(write: Write, tmp_path: Path) -> None:
    """Recipes that extend each other in a circle are named in their order."""
    (tmp_path / "a.toml").write_text('extends = "b.toml"')
    (tmp_path / "b.toml").write_text('extends = "recipe.toml"')
    with pytest.raises(BadRecipe, match=r"b\.toml:1: .*recipe\.toml > a\.toml > b\.toml > recipe\.toml"):
        load_recipe(write('extends = "a.toml"'))


SWEPT = """[sweep]
metric = "exact_match"
[sweep.grid]
train.learning_rate = [1e-4, 1e-3]
"train.schedule" = ["linear", "constant"]
[sweep.paired]
adapter.rank = [4, 8]
adapter.alpha = [8, 16]
"""


def test_a_sweep_is_every_combination(write: Write) -> None:
    """A grid is multiplied, paired lists go side by side; every run is a whole recipe."""
    recipe = load_recipe(write(MINIMAL + SWEPT))
    assert recipe.sweep is not None
    runs = [load_recipe(recipe.path, run) for run in recipe.sweep.runs]
    seen = {(r.adapter.rank, r.adapter.alpha, r.train.learning_rate, r.train.schedule) for r in runs}

    assert len(runs) == len(seen) == 8
    assert {(rank, alpha) for rank, alpha, *_ in seen} == {(4, 8.0), (8, 16.0)}
    assert (recipe.sweep.metric, recipe.sweep.alias) == ("exact_match", "best")
    assert "sweep" not in recipe.to_json()


def test_a_sweep_can_be_changed_and_extended(write: Write, tmp_path: Path) -> None:
    """`--set` and a recipe that extends another change single keys of a sweep."""
    (tmp_path / "far.toml").write_text(MINIMAL + SWEPT)
    path = write('extends = "far.toml"\n[sweep]\nalias = "winner"\n')
    sweep = load_recipe(path, ["sweep.metric=loss", "sweep.grid.train.learning_rate=[1e-5]"]).sweep

    assert sweep is not None
    assert (sweep.alias, sweep.metric, len(sweep.runs)) == ("winner", "loss", 4)
    assert all("train.learning_rate=1e-05" in changes for changes in sweep.runs)
    alone = load_recipe(write(MINIMAL), ["sweep.grid.train.seed=[1, 2]"]).sweep
    assert alone is not None
    assert alone.runs == (("train.seed=1",), ("train.seed=2",))


WRONG_SWEEPS = {
    "[sweep]\n": "nothing to vary",
    "[sweep]\ngrod = 1\n[sweep.grid]\ntrain.seed = [1]\n": "unknown key 'grod' in [sweep]",
    "[sweep.grid]\ntrain.sed = [1]\n": "'train.sed' is not a key that can be varied",
    "[sweep.grid]\nseed = [1]\n": "'seed' is not a key that can be varied",
    "[sweep.grid]\noutput.name = ['a', 'b']\n": "'output.name' is not a key that can be varied",
    "[sweep.grid]\ntrain.seed = 1\n": "sweep.grid.train.seed must be a list of values",
    "[sweep.grid]\ntrain.seed = []\n": "sweep.grid.train.seed must be a list of values",
    "[sweep.paired]\ntrain.seed = [1]\ntrain.epochs = [1, 2]\n": "equally long: train.seed 1, train.epochs 2",
    "[sweep]\ngrid = [1]\n": "sweep.grid must be a table of lists",
    "[sweep]\nmetric = 'f1'\n[sweep.grid]\ntrain.seed = [1]\n": "must be one of loss, exact_match",
    "[sweep]\nalias = 'v3'\n[sweep.grid]\ntrain.seed = [1]\n": "reserved",
    "[sweep]\nmax_runs = 2\n[sweep.grid]\ntrain.seed = [1, 2, 3]\n": "these are 3 runs, sweep.max_runs is 2",
    "[sweep.grid]\ntrain.seed = [1]\n[sweep.paired]\ntrain.seed = [2]\n": "is in sweep.grid and in sweep.paired",
}


@pytest.mark.parametrize("text", WRONG_SWEEPS)
def test_wrong_sweeps(write: Write, text: str) -> None:
    """What cannot be swept is told with its line, before anything runs."""
    told = problems(write(MINIMAL + text))
    assert WRONG_SWEEPS[text] in told[0]
    assert told[0].startswith(":")
    assert told[0].split(":")[1].isdigit()


def test_the_starter_recipe_is_a_recipe(write: Write, tmp_path: Path) -> None:
    """`recipe init` writes every key with its meaning, loads as it is, and shows the true defaults."""
    given = {"base.name": "tiny", "data.train": "train.jsonl", "output.name": "sentiment"}
    text = starter(given)
    recipe = load_recipe(write(text))
    plain = load_recipe(write(MINIMAL))

    assert recipe.to_json() == plain.to_json()
    defaults = [line[2:] for line in text.splitlines() if re.match(r"# [a-z_]+ = ", line) and line[-4:] != " ..."]
    for line in defaults:
        key, _, value = line.partition(" = ")
        table = next(name for name, keys in recipe.to_json().items() if key in keys)
        assert load_recipe(recipe.path, [f"{table}.{key}={value}"]).to_json() == plain.to_json(), line
    assert len(defaults) > 15


def test_the_json_schema_knows_what_the_loader_knows(write: Write) -> None:
    """Shipped recipes are valid by the schema, and what the loader refuses of single values it refuses too."""
    validate = fastjsonschema.compile(json_schema())
    folder = Path(__file__).parents[1] / "recipes"
    for path in folder.rglob("*.toml"):
        validate(tomllib.loads(path.read_text()))
    validate(tomllib.loads(MINIMAL + SWEPT))
    validate(tomllib.loads('extends = "x.toml"'))
    validate(tomllib.loads(MINIMAL.replace('"train.jsonl"', '["a.jsonl", "b.csv"]\nweights = [1, 0.5]')))
    refused = 0
    for line in WRONG:
        table, _, assignment = line.partition(": ")
        given = tomllib.loads(MINIMAL)
        given.setdefault(table, {}).update(tomllib.loads(assignment))
        try:
            validate(given)
        except fastjsonschema.JsonSchemaValueException:
            refused += 1
    assert refused > 0.6 * len(WRONG)
    for text in ("", '[base]\nname = "x"\n', MINIMAL + "[trian]\n", MINIMAL + "[train]\nsed = 1\n"):
        with pytest.raises(fastjsonschema.JsonSchemaValueException):
            validate(tomllib.loads(text))


def test_sources_of_the_hub(write: Write) -> None:
    """ORG/NAME is a dataset of the Hub unless it ends as a file does or is there; addresses are always of the Hub."""
    sources = {
        "org/name": HubFiles("org/name"),
        "org/name@main": HubFiles("org/name", "main"),
        "hf://datasets/org/name@abc/a/b.csv": HubFiles("org/name", "abc", "a/b.csv"),
    }
    for text, wanted in sources.items():
        recipe = load_recipe(write(MINIMAL), [f"data.train={text}"])
        assert recipe.data.train == (wanted,)
        assert read_source(str(wanted), Path()) == wanted
    (problem,) = problems(write(MINIMAL), "data.train=org/name.jsonl")
    assert "there is no file" in problem


WRONG_DATA = {
    "data.weights=[1, 2]": "data.weights has 2 numbers for 1 files",
    "data.weights=[0]": "must be numbers above 0",
    "data.weights=1": "must be a list of numbers",
    "data.train=[]": "must be a file name or Hub dataset, or a list of them",
    "data.train=[3]": "must be a file name or Hub dataset, or a list of them",
    'data.train=["train.jsonl", "x.jsonl"]': "there is no file",
    "data.train=.": "is a folder",
    "data.prompt={text}": "data.prompt needs data.answer",
    "data.system=x": "data.system needs data.prompt",
    "data.loss_on=answers": "must be one of answer, last_answer, all",
    "data.too_long=cut": "must be one of error, truncate, skip",
    "data.format=chatml": "must be one of auto, messages, sharegpt",
    "data.test_share=1": "must be from 0 to 0.9",
}


@pytest.mark.parametrize("override", WRONG_DATA)
def test_wrong_data_keys(write: Write, override: str) -> None:
    """What is wrong with a key of [data] is told before anything is read."""
    (problem,) = problems(write(MINIMAL), override)
    assert WRONG_DATA[override] in problem


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.text(st.sampled_from(list("[]\"'=.#{},\n\\ abtrainame1e-")), max_size=60))
def test_any_text_is_a_recipe_or_refused(write: Write, text: str) -> None:
    """No text makes reading a recipe end in anything but BadRecipe with lines that name the file."""
    path = write(text)
    for line in problems(path):
        assert line.startswith(":")
