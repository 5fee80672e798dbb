"""cluster.toml: what is right is read, and every mistake is named with its line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from adapterhub_local.errors import BadRecipe, InputError, NotFound
from adapterhub_local.registry.remotes import Remote
from serve.cluster.config import ClusterConfig, load_config
from serve.cluster.tables import Vllm, described


def read(tmp_path: Path, text: str) -> ClusterConfig:
    """The cluster that a file says."""
    path = tmp_path / "cluster.toml"
    path.write_text(text)
    return load_config(path)


def test_what_init_writes_is_what_is_meant_by_default(tmp_path: Path) -> None:
    """The file to begin with is read, and has the defaults."""
    assert read(tmp_path, described().replace("{base}", "tiny")) == ClusterConfig("tiny")


def test_values(tmp_path: Path) -> None:
    """Each table is read, sizes with their units, and comes back from JSON as it was."""
    text = (
        'base = "tiny"\nremote = "team"\n'
        '[replicas]\nmin = 2\nmax = 4\ncpus = 1\npin = ["a@prod"]\n[gateway]\nport = 0\n'
        '[router]\nname = "router@prod"\nthreshold = 0.5\nallow = ["team/*"]\n'
        '[engine]\nmax_rows = 4\nkv_bytes = "64MiB"\nadapter_bytes = 5\n'
    )
    vllm = read(tmp_path, 'base = "tiny"\n[vllm]\nmodel = "org/tiny"\noptions = ["--max-loras", "4"]\n')
    assert vllm.vllm == Vllm("org/tiny", options=("--max-loras", "4"))
    assert ClusterConfig.from_json(json.loads(json.dumps(vllm.to_json()))) == vllm
    config = read(tmp_path, text)
    assert (config.replicas.min, config.replicas.max, config.replicas.cpus, config.replicas.pin) == (
        2,
        4,
        1,
        ("a@prod",),
    )
    assert config.engine == {"max_rows": 4, "kv_bytes": 64 << 20, "adapter_bytes": 5_000_000}
    assert config.remote == "team"
    config = replace(config, followed=Remote("team", "s3://bucket/team", {"endpoint_url": "http://store"}))
    assert ClusterConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    with pytest.raises(InputError, match="at least 1"):
        config.scaled(0)
    with pytest.raises(InputError, match="from 3 to 2 replicas"):
        config.scaled(3, 2)


MISTAKES = [
    ("[replicas]\nmin = 1\n", "'base' is needed"),
    ('base = "t"\n[replica]\nmin = 1\n', ":2: unknown table 'replica': did you mean 'replicas'?"),
    ('base = "t"\nremote = 3\n', ":2: 'remote' must be the name of a remote"),
    ('base = "t"\n[router]\nthreshold = 0.5\n', "are of a router: give router.name"),
    ('base = "t"\n[router]\nname = "r"\nthreshold = 2\n', ":4: router.threshold = 2: must be from 0.0 to 1.0"),
    ('base = "t"\nbass = 1\n', ":2: unknown key 'bass': did you mean 'base'?"),
    ('base = "t"\n[replicas]\n\nmni = 1\n', ":4: unknown key 'mni' in [replicas]: did you mean 'min'?"),
    ('base = "t"\n[replicas]\nmin = "two"\n', ":3: replicas.min must be a whole number, not 'two'"),
    ('base = "t"\n[replicas]\nmin = 0\n', ":3: replicas.min = 0: must be from 1 to 1000"),
    ('base = "t"\n[replicas]\nmin = 3\nmax = 2\n', ":4: replicas.max = 2: must be at least replicas.min"),
    ('base = "t"\n[gateway]\notlp = "collector:4317"\n', ":3: gateway.otlp = 'collector:4317': this is not the"),
    ('base = "t"\n[gateway]\nport = 70000\n', ":3: gateway.port = 70000: must be from 0 to 65535"),
    ('base = "t"\n[engine]\nmax_rows = 0\n', ":3: max_rows is 0: it must be at least 1"),
    ('base = "t"\n[engine]\nkv_bytes = "many"\n', ":3: 'many' is not a size"),
    ('base = "t"\n[engine]\nmax_row = 4\n', ":3: unknown key 'max_row' in [engine]: did you mean 'max_rows'?"),
    ('base = "t"\nreplicas = 3\n', ":2: 'replicas' must be a table: write [replicas]"),
    ("base = ", "not TOML"),
    ('base = "t"\n[vllm]\nstart = 5\n', ":2: vllm.model is needed: the 16-bit model"),
    ('base = "t"\n[vllm]\nmodel = "m"\ncommand = []\n', ":4: vllm.command must name a program"),
    ('base = "t"\n[vllm]\nmodel = "m"\noptions = ["--port=1"]\n', ":4: vllm.options has --port=1: the replica gives"),
    ('base = "t"\n[vllm]\nmodel = "m"\n[engine]\nmax_rows = 4\n', ":5: engine.max_rows is for our engine, and [vllm]"),
    ('base = "t"\n[vllm]\nmodel = "m"\n[replicas]\npin = ["a"]\n', ":5: replicas.pin is for our engine"),
    ('base = "t"\n[vllm]\nmodel = "m"\n[router]\nname = "r"\n', ":5: router.name is for our engine"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistakes(tmp_path: Path, text: str, message: str) -> None:
    """Each mistake is named with its line and the nearest key."""
    with pytest.raises(BadRecipe) as found:
        read(tmp_path, text)
    assert message in str(found.value)


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    """A file with several mistakes names all of them."""
    with pytest.raises(BadRecipe) as found:
        read(tmp_path, "[replicas]\nmni = 1\nmin = 0\n[gateway]\nport = -1\n")
    assert len(str(found.value).splitlines()) == 4


def test_no_file(tmp_path: Path) -> None:
    """A file that is not there: the message says what writes one."""
    with pytest.raises(NotFound, match="qhub cluster init"):
        load_config(tmp_path / "none.toml")
