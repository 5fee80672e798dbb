"""Recipes: what is wrong is reported with file, line and the nearest key, all of it at once."""

import gzip
import json
import runpy
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapterhub_local.errors import BadRecipe, NotFound
from adapterhub_local.recipe import Recipe, load_recipe, load_runs
from adapterhub_local.recipe.elsewhere import CALLED, NEW_TOKENS, WITHOUT
from adapterhub_local.recipe.field import keys
from adapterhub_local.recipe.recipe import as_called_now
from adapterhub_local.recipe.schema import TABLES
from adapterhub_local.recipe.source import HubFiles, read_source
from tests.recipes import MINIMAL, WRONG, Write, problems


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


def test_every_key_from_elsewhere_has_a_key_here() -> None:
    """What other tools call a key is answered with a key that there is, under a name that is not one of ours."""
    assert all(name in keys(TABLES[table]) for table, _, name in (called.partition(".") for called in CALLED.values()))
    ours = {name for table in TABLES.values() for name in keys(table)}
    assert not ours & {*CALLED, *WITHOUT}
    assert not CALLED.keys() & WITHOUT.keys()


def test_keys_from_elsewhere_are_translated(write: Write, tmp_path: Path) -> None:
    """Keys of axolotl, LLaMA-Factory and TRL, or in the wrong table, are reported with their names here; so is YAML."""
    text = 'base_model = "x"\nload_in_4bit = true\n' + MINIMAL + "[train]\nlr = 1e-3\nrank = 8\nlora_alpha = 3\n"
    assert problems(write(text)) == [
        ":1: unknown key 'base_model': that is 'name' in [base] here",
        ":2: unknown key 'load_in_4bit': leave it out, bases are 4 bits already (`qhub base add`)",
        *(
            f":{len(text.splitlines()) + 1 - back}: unknown key '{key}' in [train]: {told}"
            for back, key, told in (
                (3, "lr", "that is 'learning_rate' here"),
                (2, "rank", "it belongs in [adapter]"),
                (1, "lora_alpha", "that is 'alpha' in [adapter] here"),
            )
        ),
    ]
    yaml = write("base_model: x\n").rename(tmp_path / "recipe.yml")
    with pytest.raises(BadRecipe, match=r"recipe.yml: not TOML: recipes are TOML, `qhub recipe init`"):
        load_recipe(yaml)


@pytest.mark.parametrize("table", ["adapter", "train", "data"])
@pytest.mark.parametrize("key", NEW_TOKENS)
def test_new_tokens_are_refused_with_the_way_out(write: Write, table: str, key: str) -> None:
    """Tokens that the base lacks would need another tokenizer: the message says what to do instead."""
    head, mark, rest = MINIMAL.partition(f"[{table}]\n")
    (problem,) = problems(write(f"{head}[{table}]\n{key} = ['<x>']\n{rest if mark else ''}"))
    assert f"unknown key '{key}' in [{table}]: leave it out, the tokenizer is the shared base's" in problem
    assert "adapter.train_tokens trains tokens that it has" in problem
    assert "write new marks as text" in problem
    assert "`qhub base add` that" in problem


def test_a_mark_at_the_start_is_no_mistake(write: Write) -> None:
    """A recipe that an editor of Windows saved, with a mark of its encoding and CRLF, is the same recipe."""
    plain = load_recipe(write(MINIMAL))
    path = write("")
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    assert load_recipe(path) == plain


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
    """A recipe that is missing, a folder, or not UTF-8 is reported as such."""
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
    others = {"text", "path", "origins", "sweep", "overrides"}
    assert set(TABLES) == {item.name for item in fields(Recipe)} - others


def test_shipped_recipes_load() -> None:
    """Every recipe that is shipped is valid, has its data, and names its command in its header."""
    folder = Path(__file__).parents[2] / "recipes"
    paths = sorted(folder.rglob("*.toml"))
    assert len(paths) >= 5
    for path in paths:
        recipe = load_recipe(path)
        assert recipe.data.test is not None
        assert recipe.output.description
        assert f"qhub train {path.relative_to(folder.parent)}" in recipe.text


def test_made_data_are_what_their_maker_makes() -> None:
    """The requests of the tools recipe come from the program beside them, and no held-out request is learned."""
    folder = Path(__file__).parents[2] / "recipes" / "data"
    made = runpy.run_path(str(folder / "make_tools.py"))
    train = gzip.decompress((folder / "tools.train.jsonl.gz").read_bytes()).decode()
    test = (folder / "tools.test.jsonl").read_text(encoding="utf-8")
    asked = [{json.loads(line)["messages"][0]["content"] for line in text.splitlines()} for text in (train, test)]

    assert train == made["lines"](0, made["TRAIN_ROWS"])
    assert test == made["lines"](1, made["TEST_ROWS"])
    assert len(asked[0]) == made["TRAIN_ROWS"]
    assert not asked[0] & asked[1]


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
    "data.train=none/*.csv": "no file matches",
    "data.prompt={text}": "data.prompt needs data.answer",
    "data.system=x": "data.system needs data.prompt",
    "data.loss_on=answers": "must be one of answer, last_answer, all",
    "data.too_long=cut": "must be one of error, truncate, skip",
    "data.format=chatml": "must be one of auto, messages, sharegpt",
    "data.test_share=1": "must be from 0 to 0.9",
}


@pytest.mark.parametrize("override", WRONG_DATA)
def test_wrong_data_keys(write: Write, override: str) -> None:
    """What is wrong with a key of [data] is reported before anything is read."""
    (problem,) = problems(write(MINIMAL), override)
    assert WRONG_DATA[override] in problem


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.sampled_from(list("[]\"'=.#{},\n\\ abtrainame1e-")), max_size=60))
def test_any_text_is_a_recipe_or_refused(write: Write, text: str) -> None:
    """No text makes reading a recipe end in anything but BadRecipe with lines that name the file."""
    path = write(text)
    for line in problems(path):
        assert line.startswith(":")


def test_everything_that_is_wrong_is_told_in_one_go(write: Write) -> None:
    """An unknown table, a wrong type, missing keys, keys that do not go together and a wrong sweep: one list."""
    text = (
        "[base]\nname = 3\n"  # 2
        '[dta]\ntrain = "train.jsonl"\n'  # 3; and [data] needs train
        "[train]\nmicro_batch_size = 3\npatience = 2\n"  # 6, 7
        '[adapter]\nfrom_version = "sql@3"\n'  # 9
        "[sweep.grid]\ntrain.sed = [1]\n"  # 11
    )
    assert problems(write(text)) == [
        ":3: unknown table [dta]: did you mean 'data'?",
        ":2: base.name must be text, not 3",
        problems(write('[base]\nname = "x"\n[output]\nname = "x"\n'))[0],
        ":9: 'from_version' in [adapter] is called 'from' now",
        ": [output] needs 'name': the adapter's name in the registry",
        ":6: micro_batch_size must divide batch_size (16)",
        ":7: train.patience needs train.eval_every: how often to evaluate",
        ":11: 'train.sed' is not a key that can be varied: write table.key, such as train.learning_rate",
    ]


def test_every_wrong_run_of_a_sweep_is_reported(write: Write) -> None:
    """What is wrong in any run is reported with the run, all of them at once; what they share is reported once."""
    path = write(MINIMAL + "[sweep.paired]\ntrain.seed = [1, -1, 2]\nadapter.rank = [4, 8, 0]\n")
    with pytest.raises(BadRecipe) as caught:
        load_runs(load_recipe(path))

    assert str(caught.value).splitlines() == [
        f"{path}: run 2 of [sweep]: train.seed = -1: must be from 0 to 4294967295",
        f"{path}: run 3 of [sweep]: adapter.rank = 0: must be from 1 to 4096",
    ]


def test_places_of_keys(write: Write) -> None:
    """A message about a key begins with the line it is written in, or with what changed it, or the file."""
    (alone,) = load_runs(load_recipe(write(MINIMAL + "[adapter]\nfrom = 'sql@3'\n"), ["train.seed=1"]))
    recipe = alone[1]

    assert recipe.adapter.from_ == recipe.to_json()["adapter"]["from"] == "sql@3"
    stored = {**recipe.to_json(), "adapter": {"rank": 16, "from_version": "sql@3"}}  # as versions kept it before
    assert as_called_now(stored)["adapter"] == {"rank": 16, "from": "sql@3"}
    assert recipe.place("adapter.from") == f"{recipe.path}:10: adapter.from"
    assert recipe.place("train.seed") == f"{recipe.path}: --set: train.seed"
    assert recipe.place("adapter.rank") == f"{recipe.path}: adapter.rank"
