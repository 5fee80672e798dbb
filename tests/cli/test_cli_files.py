"""Files that are wrong: one line, exit code 2, and nothing left behind."""

from pathlib import Path

import pytest

from adapterhub_local.lora.config import WEIGHTS
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from tests.cli.test_cli import OTHER, Q, Qhub, files, qhub, save_adapter  # noqa: F401


def contents(*folders: Path) -> dict[Path, int]:
    """Every file below the folders with its size, but for the database, which SQLite may tidy up at any time."""
    paths = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return {path: path.stat().st_size for path in paths if not path.name.startswith("registry.db")}


BAD = {  # arguments, F/ being the folder of files -> what the one line says
    "base show none": "there is no base 'none': did you mean tiny",
    "base path none": "there is no base 'none'",
    "base rm none": "there is no base 'none'",
    "base show ../tiny": "not a name",
    "base show a/b": "cannot name a base",
    "base add tiny F": "exists already",
    "base add Bad F": "not a name",
    "base add b F/none": "there is no folder or file",
    "base add b F": "no config.json",
    "add F/good.safetensors --name x --base none": "there is no base 'none'",
    "add F/other.safetensors --name x": "made for another base",
    "add F/large.safetensors --name x": "in base 'tiny' it is 64 x 64",
    "add F/unknown.safetensors --name x": "model.layers.9.mlp.up_proj, which base 'tiny'",
    "add F/cut.safetensors --name x": "truncated",
    "add F/nan.safetensors --name x": "NaN or infinity",
    "add F/text.safetensors --name x": "not a safetensors file",
    "add F/empty.safetensors --name x": "not a safetensors file",
    "add F/pickle --name x": "is a pickle",
    "add F/none.safetensors --name x": "there is no file",
    "add https://huggingface.co/me/x --name x": "`qhub pull ORG/REPO` registers an adapter of the Hugging Face Hub",
    "add F/good.safetensors --name X": "not a name",
    "add F/good.safetensors --name x --alias latest": "reserved",
    "add F/good.safetensors": "Missing option '--name'",
    "merge F/good.safetensors F/other.safetensors --weights 0.7,0.3": "different bases",
    "merge F/good.safetensors F/large.safetensors --weights 0.7,0.3": "made for different models",
    "merge F/good.safetensors F/cut.safetensors --weights 0.7,0.3": "truncated",
    "merge F/good.safetensors F/nan.safetensors --weights 0.7,0.3": "NaN or infinity",
    "merge F/good.safetensors F/good.safetensors --weights 0.7": "2 adapters and 1 weights",
    "merge F/good.safetensors --weights 0.7,0.3": "1 adapters and 2 weights",
    "merge F/good.safetensors --weights nan": "'nan' is not a weight",
    "merge F/good.safetensors --weights inf": "'inf' is not a weight",
    "merge F/good.safetensors --weights 0.7;0.3": "is not a weight",
    "merge F/good.safetensors --weights 0": "all weights are zero",
    "merge F/good.safetensors --weights 1e300": "too large",
    "merge F/good.safetensors": "Missing option '--weights'",
    "merge --weights 1": "Missing argument 'ADAPTERS...'",
    "merge none@1 --weights 1": "there is no adapter 'none'",
    "merge ~nobody-here/a.safetensors --weights 1": "there is no file",
    "merge F/good.safetensors --weights 1 -o F/cut.safetensors": "exists already",
    "merge F/good.safetensors --weights 1 -o F/no/folder.safetensors": "create the folder first",
    "merge F/good.safetensors --weights 1 -o x.safetensors --name x": "exclude each other",
    "merge F/good.safetensors --weights 1 --alias prod": "--alias needs --name",
    "merge F/good.safetensors --weights 1 --name x --alias v3": "reserved",
    "merge F/good.safetensors --weights 1 --rank 3": "its modules have rank 2",
    "merge F/good.safetensors --weights 1 --rank big": "give a whole number from 1",
    "merge F/good.safetensors --weights 1 --rank 1 --energy 0.9": "rank and energy exclude each other",
    "merge F/good.safetensors --weights 1 --max-error 2": "max_error is 2",
    "merge F/good.safetensors --weights 1 --dtype int8": "use one of auto, float32",
    "merge F/good.safetensors --weights 1 --method tie": "did you mean ties",
    "merge F/good.safetensors --weights 1 --density 0.5": "weighted_sum has no parameter 'density'",
    "merge F/good.safetensors --weights 1 --method slerp": "between two adapters, not 1",
    "merge F/good.safetensors --weights 1 --method ties --space dense": "use core or full",
    "merge F/good.safetensors --weights 1 --dry-run --name x": "--dry-run writes nothing",
    "merge F/good.safetensors --weights 1 --plot x.png": "must end in .svg",
    "merge F/good.safetensors --weights 1 --plot F/cut.safetensors": "must end in .svg",
    "merge F/none-such.toml": "there is no merge plan",
    "merge F/good.safetensors --weights 1 --require x.loss<1": "cannot be checked without data",
    "merge F/good.safetensors --weights 1 --require x>1": "is not a requirement",
    "merge F/good.safetensors --weights 1 --data x": "write a task and its file",
    "merge F/good.safetensors --weights 1 --data x=F/none.jsonl": "there is no data file",
    "merge F/good.safetensors --weights 1 --limit 3": "give --data TASK=FILE",
    "merge F/good.safetensors --weights 1 --dry-run --data x=y": "leave --dry-run out",
    "merge F/good.safetensors --weights 1 --dora-rank 3": "give --with-base NAME",
    "merge F/good.safetensors --weights 1 --with-base none": "there is no base 'none'",
    "merge F/none.toml --with-base x": "--with-base belongs in the plan",
    "tune-merge F/none-such.toml": "there is no merge plan",
    "merge F/none.toml --rank 2": "--rank belongs in the plan",
    "show none": "there is no adapter 'none'",
    "show kep": "did you mean kept",
    "show kept@2": "has versions 1",
    "show kept@0": "numbered from 1",
    "show kept@@": "is not a reference",
    "path ../../etc/passwd": "not a name",
    "list none": "there is no adapter 'none'",
    "alias set kept latest 1": "reserved",
    "alias set kept prod 2": "there is no 'kept@2'",
    "alias set kept prod 0": "0 is not in the range",
    "alias set kept@1 prod 1": "name and the version apart",
    "alias set kept prod 1 --expect 3": "points to nothing, not to 3",
    "alias list none": "there is no adapter 'none'",
    "export kept -o x.bin": "must end in .safetensors",
    "export kept -o F/cut.safetensors": "exists already",
    "export none -o x.safetensors": "there is no adapter 'none'",
    "export kept": "Missing option",
    "export kept -o x.safetensors --oci y.tar": "exclude each other",
    "export kept --oci F/cut.safetensors": "exists already",
    "import F/none.tar": "there is no file",
    "import F/text.safetensors": "is not a tar in the OCI layout",
    "rm kept": "say which version",
    "rm kept@2": "there is no 'kept@2'",
    "tag kept ?x": "is not a tag",
    "tag kept x --remove": "has no tag 'x'",
    "list --metric loss": "is not a condition",
    "search !": "no word to search for",
    "alias rollback kept prod": "never pointed elsewhere",
    "alias rm kept prod": "there is no alias kept@prod",
    "lineage none": "there is no adapter 'none'",
    "diff kept none": "there is no adapter 'none'",
    "verify none": "there is no adapter 'none'",
    "train F/recipe.toml": "data.train: there is no file",
    "train F/unknown.toml": "unknown.toml:8: unknown key 'learning_rat' in [train]: did you mean 'learning_rate'?",
    "train F/none.toml": "there is no base 'none'",
    "train F/missing.toml": "there is no recipe",
    "train F/recipe.toml --resume --restart": "exclude each other",
    "mrge a b": "there is no command 'mrge': did you mean 'merge'",
    "list --jsn": "No such option '--jsn'",
    "alias": "Usage: qhub alias",
    "show": "Missing argument 'REFERENCE'",
}


@pytest.mark.parametrize("line", BAD)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_bad_input_is_one_line_and_leaves_nothing(line: str, qhub: Qhub, files: Path, home: Home) -> None:  # noqa: F811
    """Exit code 2, one line on stderr that says what is wrong, and not a file more or less in home, folder or here."""
    Registry().publish("kept", {WEIGHTS: b"x"}, {"kind": "test"})
    _ = Registry().resolve("kept").path
    before = contents(home.root, files, Path.cwd())
    done = qhub(*line.replace("F/", f"{files}/").replace(" F", f" {files}").split())
    assert done.code == 2, done.err
    assert done.out == ""
    assert BAD[line] in done.err
    assert "Traceback" not in done.err
    if not done.err.startswith("Usage"):
        assert done.err.startswith("qhub: ")
        assert done.err.count("\n") == 1
    after = contents(home.root, files, Path.cwd())
    assert after == before
    assert [str(version) for version in Registry().versions()] == ["kept@1"]
    assert Registry().aliases("kept") == {}
