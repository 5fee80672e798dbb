"""Model cards: read by the Hub's own parser, and without any path of this machine."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from adapterhub_local.errors import (
    Incompatible,
)
from adapterhub_local.hub import push
from adapterhub_local.hub.package import CARD, MANIFEST
from adapterhub_local.hub.scrub import machine_roots, without_paths
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from tests.hub_adapters import BASE, LINEAGE, REPO, publish, pulled, pushed
from tests.hub_server import HubServer


def test_no_path_of_this_machine_is_published(hub: HubServer, registry: Registry, home: Home) -> None:
    """Paths in recipe and lineage are cut short in every pushed file, the manifest says where, and it pulls."""
    here = [str(home.root), str(Path.cwd()), str(Path.home())]
    text = f'data = "{home.root}/data/train.jsonl"\nother = "{Path.cwd()}/x"\nthird = "/srv/secret/y.jsonl"\n'
    data = [{**LINEAGE["data"][0], "file": f"{Path.home()}/d/train.jsonl"}]
    version = publish(registry, recipe={"text": text}, data=data)
    pushed(hub, registry)

    everything = b"".join(hub.repos[REPO].files().values())
    assert [path for path in [*here, "/srv/secret"] if path.encode() in everything] == []
    fields = json.loads(hub.repos[REPO].files()[MANIFEST])
    assert fields["shortened"] == ["data[0].file", "recipe.text"]
    assert fields["lineage"]["recipe"]["text"] == 'data = "data/train.jsonl"\nother = "x"\nthird = "y.jsonl"\n'
    assert pulled(hub, registry).version.content_digest == version.content_digest


def test_path_inside_the_weights_stops_the_push(hub: HubServer, registry: Registry, home: Home) -> None:
    """The weights are pushed as they are, so a path of this machine in their header is refused."""
    publish(registry, hub_id=f"{home.root}/bases/tiny")

    with pytest.raises(Incompatible, match="a folder of this machine"):
        pushed(hub, registry, base_id=BASE)
    assert hub.requests == []


def test_paths_are_told_from_what_looks_like_them(tmp_path: Path) -> None:
    """Hub ids, URLs, relative paths and prose with slashes stay; absolute paths do not."""
    kept = ["org/model", "https://host/a/b.html", "./data/x", "../up/x", "and/or", "1/2/3", "/nothink", "s3://b/k/x"]
    cut = {"/srv/a/b.jsonl": "b.jsonl", "~/x/y": "y", "file:///srv/a/b": "b", r"C:\\Users\\me\\x": "x"}

    value, places = without_paths({"kept": kept, "cut": list(cut)}, machine_roots(tmp_path))

    assert value == {"kept": kept, "cut": list(cut.values())}
    assert places == [f"cut[{index}]" for index in range(len(cut))]


def test_card_is_read_by_the_hubs_own_parser(hub: HubServer, registry: Registry) -> None:
    """The model card has the base, tags and measured results as data, and tables and a recipe for people."""
    revision = "12" * 20
    publish(registry, base={**LINEAGE["base"], "revision": revision})
    pushed(hub, registry)

    text = hub.repos[REPO].files()[CARD].decode()
    data = ModelCard(text).data

    assert (data.library_name, data.base_model, data.pipeline_tag) == ("peft", BASE, "text-generation")
    assert data.to_dict()["base_model_relation"] == "adapter"
    assert data.tags == ["lora", "qlora", "qhub"]
    results = {result.metric_type: result.metric_value for result in data.eval_results}
    assert results == {"loss": 0.5, "exact_match": 0.875}
    assert "| sentiment | exact_match | 0.25 [0.112\N{EN DASH}0.469] | 0.875 [0.669\N{EN DASH}0.960] | 20 |" in text
    assert "sentiment\\|train.jsonl" in text
    assert "````toml" in text
    assert "| Target modules | `q_proj`, `v_proj` |" in text
    assert f'from_pretrained("{BASE}", revision="{revision}", quantization_config=nf4)' in text
    assert f"qhub pull {REPO}@v1" in text


def test_card_of_a_merge_names_parents_and_weights(hub: HubServer, registry: Registry) -> None:
    """A merged version lists what it was merged from, and by which method."""
    parents = [{"reference": "a@1", "content_digest": "sha256:aa", "weight": 0.7}, {"reference": "b@2", "weight": -0.3}]
    publish(registry, kind="merge", parents=parents, merge={"method": "weighted_sum", "rank": 8}, metrics={})
    pushed(hub, registry)

    text = hub.repos[REPO].files()[CARD].decode()

    assert "| a@1 | 0.7 | `sha256:aa` |" in text
    assert "| b@2 | -0.3 |" in text
    assert "- method: weighted_sum" in text
    assert "merge" in ModelCard(text).data.tags


def test_card_of_a_bare_lineage_is_valid(hub: HubServer, registry: Registry) -> None:
    """Nothing in the lineage is needed but a base, which may be given."""
    version = publish(registry)
    registry.publish("bare", {file.path: version.path / file.path for file in version.files}, {})

    push(registry, "bare", REPO, base_id=BASE, token=hub.token, endpoint=hub.endpoint)

    assert ModelCard(hub.repos[REPO].files()[CARD].decode()).data.base_model == BASE
