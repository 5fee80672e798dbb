"""Where versions came from, and how two of them differ."""

import json
from pathlib import Path

import pytest
import torch

from adapterhub_local.cli.main import run
from adapterhub_local.lora.adapter import Delta
from adapterhub_local.lora.config import AdapterConfig
from adapterhub_local.lora.write import tensor_name, write_adapter
from adapterhub_local.registry import Registry, Version
from adapterhub_local.registry.ancestry import ancestry, children, dot, mermaid, text
from adapterhub_local.registry.gc import remove
from tests.stores import LINEAGE, files, merged

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"


def family(registry: Registry) -> Version:
    """A merge of a merge and a trained version, one of which occurs twice."""
    data = [{"role": "train", "file": "d.jsonl", "rows": 7, "digest": "sha256:" + "1" * 64}]
    first = registry.publish("a", files(1), {**LINEAGE, "data": data})
    second = registry.publish("b", files(2), LINEAGE)
    return merged(registry, "top", (merged(registry, "mid", (first, 0.7), (second, -0.3)), 1.0), (second, 0.5))


def test_the_tree_goes_down_to_the_data() -> None:
    """Parents with weights, their parents, and the data of what was trained."""
    registry = Registry()
    lines = list(text(ancestry(registry, family(registry))))
    assert [line.partition("  (")[0] for line in lines] == [
        *("top@1", "├── 1 x mid@1", "│   ├── 0.7 x a@1", "│   │   └── d.jsonl", "│   └── -0.3 x b@1", "└── 0.5 x b@1")
    ]
    assert "weighted_sum" in lines[0]
    assert "train data, 7 rows" in lines[3]
    assert children(registry, registry.resolve("b")) == ["mid@1", "top@1"]


def test_a_parent_that_is_gone_is_still_named() -> None:
    """A removed parent, and a file that was never registered, are leaves with what is known of them."""
    registry = Registry()
    top = family(registry)
    remove(registry, registry.resolve("mid@1"), force=True)
    lines = list(text(ancestry(registry, top)))
    assert lines[1].startswith("├── 1 x mid@1  (not in this registry, sha256:")
    odd = registry.publish(
        "odd", files(5), {"parents": [{"reference": 'x".safetensors', "weight": 1}], "kind": "merge"}
    )
    tree = ancestry(registry, odd)
    assert any("x&quot;.safetensors" in line for line in mermaid(tree))
    assert any('x\\".safetensors' in line for line in dot(tree))


def test_graphs_draw_each_version_once() -> None:
    """Mermaid and Graphviz texts have one box a version and one arrow a parent, with its weight."""
    registry = Registry()
    tree = ancestry(registry, family(registry))
    for draw, arrow in ((mermaid, "-->"), (dot, "->")):
        lines = list(draw(tree))
        assert sum("b@1" in line for line in lines) == 1
        assert sum(arrow in line for line in lines) == 5
        assert any("-0.3" in line for line in lines)


def trained(name: str, folder: Path, deltas: dict[str, Delta], seed: int) -> Version:
    """A version with these deltas and a recipe with this seed."""
    folder.mkdir()
    tensors = {
        tensor_name(module, factor): getattr(delta, factor) for module, delta in deltas.items() for factor in "AB"
    }
    shapes = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    written = write_adapter(folder, AdapterConfig(2, 2, ("q_proj", "k_proj")), shapes, tensors.items(), None)
    lineage = {**LINEAGE, "recipe": {"train": {"seed": seed, "epochs": 1.0}}}
    return Registry().publish(name, written, lineage)


def test_diff_says_what_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Keys that differ, and norm and cosine of each module, equal to those of the dense deltas."""
    generator = torch.Generator().manual_seed(0)

    def delta() -> Delta:
        return Delta(torch.randn(2, 8, generator=generator), torch.randn(6, 2, generator=generator), 1.0)

    left, right, other = delta(), delta(), delta()
    trained("left", tmp_path / "left", {Q: left, K: other}, 0)
    trained("right", tmp_path / "right", {Q: right}, 1)
    with pytest.raises(SystemExit) as caught:
        run(["diff", "left", "right@1", "--json"])
    assert caught.value.code == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["lineage"] == {"recipe.train.seed": [0, 1]}
    modules = {entry["module"]: entry for entry in shown["modules"]}
    a, b = left.dense().flatten().double(), right.dense().flatten().double()
    assert modules[Q]["left"] == pytest.approx(float(a.norm()), rel=1e-5)
    assert modules[Q]["cosine"] == pytest.approx(float(a @ b / (a.norm() * b.norm())), abs=1e-5)
    assert (modules[K]["right"], modules[K]["cosine"]) == (None, None)
    with pytest.raises(SystemExit) as caught:
        run(["diff", "left", "left"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert "the files are the same" in out
    assert " 1 " in out.splitlines()[-3]


def test_lineage_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Text with what came of it, Mermaid and Graphviz."""
    family(Registry())
    for line, said in [("mid", "merged into top@1"), ("top --mermaid", "flowchart TD"), ("top --dot", "digraph")]:
        with pytest.raises(SystemExit) as caught:
            run(["lineage", *line.split()])
        assert caught.value.code == 0
        assert said in capsys.readouterr().out
