"""Recipes of several layers: extended, swept, changed by --set; and as text and schema."""

import re
import tomllib
from pathlib import Path

import fastjsonschema
import pytest

from adapterhub_local.errors import BadRecipe
from adapterhub_local.recipe import load_recipe
from adapterhub_local.recipe.schema_json import json_schema
from adapterhub_local.recipe.write import resolved, resolved_text, starter
from tests.recipes import MINIMAL, WRONG, Write, problems

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
    """A mistake is reported with the file and line where it is written, whichever of the recipes that is."""
    (tmp_path / "other.toml").write_text(MINIMAL.replace('name = "tiny"', 'nam = "tiny"'))
    with pytest.raises(BadRecipe) as caught:
        load_recipe(write('extends = "other.toml"\n[train]\nsed = 1\n'), ["train.epochs=0"])
    lines = str(caught.value).splitlines()

    assert lines[0].startswith(f"{tmp_path / 'other.toml'}:2: unknown key 'nam'")
    assert lines[1].startswith(f"{tmp_path / 'other.toml'}:1: [base] needs 'name'")
    assert lines[2].startswith(f"{tmp_path / 'recipe.toml'}:3: unknown key 'sed'")
    assert lines[3].startswith(f"{tmp_path / 'recipe.toml'}: --set: train.epochs = 0: must be from 0.001 to 10000")
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
    """What cannot be swept is reported with its line, before anything runs."""
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
    defaults, table = [], ""
    for line in text.splitlines():
        if header := re.fullmatch(r"(?:# )?\[([a-z]+)\]", line):
            table = header[1]
        elif re.match(r"# [a-z_]+ = ", line) and line[-4:] != " ...":
            key, _, value = line[2:].partition(" = ")
            defaults.append(f"{table}.{key}={value}")
    for change in defaults:
        assert load_recipe(recipe.path, [change]).to_json() == plain.to_json(), change
    assert len(defaults) > 15


def test_the_json_schema_knows_what_the_loader_knows(write: Write) -> None:
    """Shipped recipes are valid by the schema, and what the loader refuses of single values it refuses too."""
    validate = fastjsonschema.compile(json_schema())
    folder = Path(__file__).parents[2] / "recipes"
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
