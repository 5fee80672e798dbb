"""The rooms and their doors: which module may import which, how long a file may be, and what the library shows."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import adapterhub_local
from adapterhub_local.cli.main import VERBS
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "adapterhub_local").rglob("*.py")) + sorted((ROOT / "serve").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MAX_LINES = 400
# The rooms from top to bottom, one a line: a room imports rooms below it only, in functions too.
ORDER = (
    "cli",
    "api",
    "serve/__main__",
    "serve/bench",
    "serve/cluster",
    "serve/server",
    "serve/configuration",
    "serve/console_server",
    "serve/listen",
    "serve/tls",
    "serve/http",
    "serve/console",
    "serve/registry_api",
    "serve/services",
    "serve/service",
    "serve/routing",
    "serve/read",
    "serve/answers",
    "serve/text",
    "serve/requests",
    "serve/auth",
    "serve/redis_limits",
    "serve/limits",
    "serve/access",
    "serve/metrics",
    "serve/labelled",
    "serve/traces",
    "serve/usage",
    "serve/course",
    "train",
    "serve/engine",
    "serve/adapters",
    "serve/lora",
    "serve/kernels",
    "serve/options",
    "serve/memory",
    "serve/threads",
    "serve/jobs",
    "serve/follow",
    "serve/log",
    "serve/errors",
    "plan",
    "router",
    "tune",
    "evaluate",
    "rows",
    "data",
    "export",
    "hub",
    "oci",
    "adopt",
    "vllm",
    "doctor",
    "merge",
    "base",
    "registry",
    "lora",
    "recipe",
    "draw",
    "cores",
    "client",
    "keys",
    "actor",
    "settings",
    "refs",
    "intervals",
    "bounds",
    "progress",
    "counts",
    "machine",
    "durable",
    "digests",
    "options",
    "sizes",
    "lazy",
    "signals",
    "apart",
    "visible",
    "regular",
    "noise",
    "errors",
)
LEVEL = {room: level for level, room in enumerate(ORDER)}
LIGHT_ROOMS = (
    "registry",
    "recipe",
    "actor",
    "refs",
    "settings",
    "errors",
    "durable",
    "digests",
    "noise",
    "keys",
    "options",
    "sizes",
    "lazy",
    "signals",
)
DOORS = {"adapterhub_local/__init__", "adapterhub_local/__main__", "serve/__init__"}  # they name what is inside


def relative(path: Path) -> str:
    """A path as people name it."""
    return str(path.relative_to(ROOT))


def imports(path: Path) -> Iterator[str]:
    """The full names of the modules a file imports, anywhere in it, names from packages included."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*parts, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def room(name: str) -> str | None:
    """The room a module is in; None for other packages and for the doors of our own."""
    parts = name.split(".")
    if parts[0] == "serve" and len(parts) > 1:
        parts = ["", "/".join(parts[:2])]
    elif parts[0] != "adapterhub_local" or len(parts) == 1:
        return None
    return parts[1] if parts[1] in LEVEL else None


def test_every_module_is_in_a_room_that_is_known() -> None:
    """No file lies outside the rooms of the order, and every room of the order has a file."""
    seen = set()
    for path in SOURCES:
        if relative(path).removesuffix(".py") in DOORS:
            continue
        own = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
        assert own is not None, relative(path)
        seen.add(own)
    assert seen == set(ORDER)
    assert len(ORDER) == len(LEVEL)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_go_one_way(path: Path) -> None:
    """A room imports itself and rooms below it, never one above it, not even inside a function."""
    own = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if own is None:
        return
    for name in imports(path):
        other = room(name)
        if other is not None and other != own:
            assert LEVEL[other] > LEVEL[own], f"{relative(path)} imports {name}"
        if name.split(".")[0] == "serve" and not own.startswith("serve/"):
            allowed = (
                "adapterhub_local/cli/serve.py",
                "adapterhub_local/cli/train.py",  # the runs of a sweep on the cluster
                "adapterhub_local/cli/cluster.py",
                "adapterhub_local/cli/console.py",
                "adapterhub_local/cli/doctor.py",  # whether the kernels are compiled
                "adapterhub_local/api.py",
                "adapterhub_local/train/objectives/drawing.py",  # answers of GRPO
            )
            assert relative(path) in allowed, f"{relative(path)} imports {name}"


def test_nobody_reaches_into_the_engine() -> None:
    """What serves requests asks the engine itself, which could be in another process, never its live parts."""
    inside = re.compile(r"(?<!serve\.)\bengine\.(pool|slots|scheduler|runner|pages|stats|records)\b")
    others = [path for path in SOURCES if not relative(path).startswith(("serve/engine/", "adapterhub_local/"))]
    assert not [f"{path}:{number}" for path in others for number, line in numbered(path) if inside.search(line)]


def test_only_light_rooms_are_seen_from_the_registry_and_below() -> None:
    """Registry, recipe and all below them name neither torch nor transformers: they handle files and digests."""
    for path in SOURCES:
        own = path.relative_to(ROOT).parts[1]
        if own.removesuffix(".py") in LIGHT_ROOMS:
            heavy = {name.split(".")[0] for name in imports(path)} & {"torch", "transformers", "peft", "safetensors"}
            assert not heavy, relative(path)


def test_only_settings_reads_the_environment() -> None:
    """Every environment variable is read in one file, so that all of them are listed there."""
    for path in SOURCES:
        if relative(path) == "adapterhub_local/settings.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_read = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb")
            assert not is_read, f"{relative(path)}:{getattr(node, 'lineno', 0)} reads the environment"
        assert not {"os.environ", "os.getenv"} & set(imports(path)), relative(path)


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=relative)
def test_every_module_says_what_it_is(path: Path) -> None:
    """Every module that has code has a docstring, and none is longer than a person reads at once."""
    text = path.read_text(encoding="utf-8")
    assert not text.strip() or ast.get_docstring(ast.parse(text)), f"{relative(path)} has no docstring"
    assert len(text.splitlines()) <= MAX_LINES, f"{relative(path)} is too long"


@pytest.mark.parametrize("path", TESTS, ids=relative)
def test_every_test_says_what_it_proves(path: Path) -> None:
    """Each test function has a docstring of behaviour, and no two in a file have one name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    tests = [function for function in functions if function.name.startswith("test_")]
    missing = [function.name for function in tests if not ast.get_docstring(function)]
    assert not missing, f"{relative(path)}: {missing}"
    names = [function.name for function in tree.body if isinstance(function, ast.FunctionDef)]
    assert len(names) == len(set(names)), relative(path)


def test_the_library_shows_what_it_lists() -> None:
    """`__all__` is everything public that the library gives, each name is loaded when asked for, and nothing before."""
    code = (
        "import sys, types, adapterhub_local as a;"
        "heavy = {'torch', 'transformers', 'pydantic', 'click', 'numpy'} & set(sys.modules); assert not heavy, heavy;"
        "given = {n: getattr(a, n) for n in a.__all__};"
        "assert not {'torch', 'transformers', 'peft', 'fastapi'} & set(sys.modules);"
        "assert set(a.__all__) <= set(dir(a)) and set(a.__all__) == set(a._HOMES);"
        "assert all((v.__doc__ or '').strip() for v in given.values());"
        "print(*sorted({n for n, v in vars(a).items() if n[0] != '_' and not isinstance(v, types.ModuleType)"
        " and n not in ('Any', 'TYPE_CHECKING')} | set(given)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=PATIENCE)
    assert done.stdout.split() == sorted(adapterhub_local.__all__)


def test_every_verb_has_its_file() -> None:
    """A verb is one file of the command line, and there is no file that is not a verb."""
    helpers = {"__init__", "main", "output", "merge_report"}
    files = {path.stem for path in (ROOT / "adapterhub_local" / "cli").glob("*.py")}
    assert files - helpers == {verb.replace("-", "_") for verb in VERBS}


def test_no_test_asserts_a_speed() -> None:
    """What must end or come is held to `tests.patience`, which no machine is too slow for."""
    timed = re.compile(r"assert .*time\.(monotonic|process_time|perf_counter|time)\(\).* < [0-9.]+($|[ ,:] *($|[^* ]))")
    found = [f"{path.name}:{number}" for path in TESTS for number, line in numbered(path) if timed.search(line)]
    assert not found


def numbered(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file with their numbers."""
    yield from enumerate(path.read_text().splitlines(), 1)


LIGHT = [
    *("--help", "--version", "list", "list --json", "list sentiment", "show sentiment", "show sentiment --json"),
    *("path sentiment@prod", "alias list sentiment", "alias set sentiment prod 1", "base list", "base list --json"),
    *("key list --json", "key create --rate 1/s", "key revoke nothing"),
    *("base show nothing", "base path nothing", "export sentiment -o out.safetensors", "show nothing", "merge --help"),
    *("list --tag x --metric a>1", "search x", "lineage sentiment", "alias log sentiment", "tag sentiment x"),
    *("remote list", "remote add team shared", "sync push team sentiment", "remote show team"),
    *("sync pull team sentiment", "sync pull team sentiment@2"),
    *(
        "alias protect sentiment canary --approvals 1",
        "alias show sentiment canary",
        "approve sentiment@1 --for canary",
    ),
    *("history", "history --json", "hook list", "hook deliver", "gc --keep 3", "attest sentiment -o -"),
    *("attest sentiment --ml-bom -o -", "completion fish", "doctor"),
    *("verify sentiment", "fsck", "gc", "describe sentiment x", "diff --help", "rm nothing@1"),
    *("runs list", "runs list --json", "runs show nothing", "runs rm nothing"),
    *(
        "recipe init x.toml",
        "recipe show x.toml",
        "recipe check x.toml",
        "recipe schema",
        "data preview x.toml",
        "data from-log none --out rows.jsonl",
    ),
    *("console --help", "train --help", "train none.toml", "merge a.safetensors --weights nan", "base rm nothing"),
]


def test_light_verbs_load_no_heavy_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Help, listing, showing, aliases, paths and export answer without torch, transformers, PEFT or Hub client."""
    monkeypatch.chdir(tmp_path)
    code = f"""
import sys
from adapterhub_local.registry import Registry
files = {{"adapter_model.safetensors": b"weights", "adapter_config.json": b"{{}}"}}
Registry().publish("sentiment", files, {{"kind": "train", "base": {{"name": "tiny"}}}}, alias="prod")
from adapterhub_local.cli.main import run
for line in {LIGHT!r}:
    try:
        run(line.split())
    except SystemExit:
        pass
    for name in ("torch", "transformers", "peft", "safetensors", "huggingface_hub", "fastapi", "pydantic", "numpy"):
        assert name not in sys.modules, (line, name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.safetensors").read_bytes() == b"weights"
