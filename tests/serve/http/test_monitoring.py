"""Dashboard and alerts of examples/monitoring ask for what there is, and a real Prometheus gets data for all of it."""

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import click
import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.keys import Keys
from adapterhub_local.registry import Registry
from serve.__main__ import command
from serve.cluster.call import Whole
from serve.cluster.merged import merged_metrics
from tests.patience import PATIENCE
from tests.serve.adapter_makers import publish
from tests.serve.conftest import Server

FOLDER = Path(__file__).parents[3] / "examples" / "monitoring"
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
ALERTS = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"][0]["rules"]
PANELS = {panel["title"]: panel for panel in DASHBOARD["panels"] if panel["type"] != "row"}
EXPRESSIONS = {
    **{f"{title} {target['refId']}": target["expr"] for title, panel in PANELS.items() for target in panel["targets"]},
    **{f"variable {each['name']}": each.get("definition", "") for each in DASHBOARD["templating"]["list"]},
    **{rule["alert"]: rule["expr"] for rule in ALERTS},
}
OF_PROMETHEUS = {"job", "instance"}  # labels that it adds itself
NAME = re.compile(r"\b((?:qhub_|vllm:)\w+)(?:\{([^}]*)\})?")
with_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="no promtool: apt-get install prometheus")


@pytest.fixture(scope="module")
def watched(built_base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that wants keys, with two adapters that nobody has asked yet."""
    registry = Registry(tmp_path_factory.mktemp("watched"))
    base = read_record(built_base)
    publish(registry, "alpha", base, seed=1, rank=4)
    publish(registry, "beta", base, seed=2, rank=4)
    server = Server(load_base(base, device="cpu"), registry)
    keys = Keys(registry.home)
    server.token = keys.create(scopes=("metrics",))[1]
    asking = keys.create()[1]
    server.http.headers["Authorization"] = f"Bearer {asking}"
    yield server
    server.stop()


def use(server: Server) -> None:
    """Something of every kind: answers, errors."""
    for model in ("alpha", "beta", "nothing"):
        server.complete(model=model, prompt="Hello", max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def scraped(watched: Server) -> dict[str, tuple[str, set[str]]]:
    """Every sample's name as a scrape of a gateway has it -> the type of its family, and its labels."""
    use(watched)
    text = watched.http.get("/metrics", headers={"Authorization": f"Bearer {watched.token}"}).content
    merged = merged_metrics(watched.service.metrics.registry, [Whole("r1", 200, (), text)])
    found: dict[str, tuple[str, set[str]]] = {}
    for family in text_string_to_metric_families(merged.decode()):
        for sample in family.samples:
            found.setdefault(sample.name, (family.type, set()))[1].update(sample.labels)
    return found


@pytest.mark.parametrize("title", EXPRESSIONS)
def test_what_is_asked_for_is_there(title: str, scraped: dict[str, tuple[str, set[str]]]) -> None:
    """Every metric and label of an expression is one of a scrape; what only grows, and nothing else, for its rate."""
    expression = EXPRESSIONS[title]
    known = set(OF_PROMETHEUS)
    for name, selector in NAME.findall(expression):
        kind, labels = scraped[name]
        known |= labels
        assert set(re.findall(r"(\w+)\s*(?:=|!=|=~|!~)\s*\"", selector)) <= labels | OF_PROMETHEUS
        if title.startswith("variable "):
            continue
        has_rate = bool(re.search(rf"\b(rate|increase)\({re.escape(name)}\b", expression))
        assert has_rate == (kind in ("counter", "histogram")), name
    for group in re.findall(r"by \(([^)]*)\)", expression):
        assert {each.strip() for each in group.split(",")} <= known


@pytest.mark.parametrize("title", PANELS)
def test_legends_name_labels_that_are_left(title: str) -> None:
    """What a legend names is a label that its expression leaves; each asks the data source and servers chosen."""
    for target in PANELS[title]["targets"]:
        assert target["datasource"]["uid"] == "${datasource}"
        assert '{job="$job", instance=~"$instance"' in target["expr"]
        left = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", target["expr"])))) | OF_PROMETHEUS
        left |= {"replica", "base"} if " by " not in target["expr"] else set()
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= left


def test_alerts_name_options_that_there_are() -> None:
    """What an alert advises can be done: each option that it names is one of `qhub serve`."""
    options = {name for each in command.params if isinstance(each, click.Option) for name in each.opts}
    named = [name for rule in ALERTS for name in re.findall(r"--[a-z-]+", rule["annotations"]["description"])]
    assert named
    assert set(named) <= options


@with_promtool
def test_promtool_takes_them(tmp_path: Path) -> None:
    """Prometheus' own tool accepts rules and configuration, and the rules' tests pass."""
    folder = shutil.copytree(FOLDER, tmp_path / "monitoring")
    (folder / "qhub.token").write_text("qhub-1")
    for arguments in (["check", "rules", "alerts.yml"], ["check", "config", "prometheus.yml"],
                      ["test", "rules", "alerts_test.yml"]):  # fmt: skip
        done = subprocess.run(["promtool", *arguments], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not shutil.which("prometheus"), reason="no prometheus: apt-get install prometheus")
def test_a_real_prometheus_has_data_for_every_panel(watched: Server, tmp_path: Path) -> None:
    """With the configuration as it is shipped, each panel's queries return numbers, and each alert can be evaluated.

    It takes seconds, since rates need two scrapes; nothing else shows that all that Grafana asks is answered.
    """
    folder = shutil.copytree(FOLDER, tmp_path / "monitoring")
    (folder / "qhub.token").write_text(watched.token)
    shipped = (folder / "prometheus.yml").read_text()
    own = shipped.replace("127.0.0.1:8000", watched.url.removeprefix("http://")).replace("15s", "1s")
    (folder / "prometheus.yml").write_text(own)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    arguments = ["--config.file=prometheus.yml", f"--web.listen-address={address}", "--storage.tsdb.path=data"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(["prometheus", *arguments], cwd=folder, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://{address}/api/v1", trust_env=False) as prometheus:
            deadline = time.monotonic() + PATIENCE

            def ask(path: str, **parameters: str) -> dict:
                while True:
                    assert process.poll() is None, (folder / "log").read_text()
                    assert time.monotonic() < deadline
                    try:
                        return prometheus.get(path, params=parameters).json()["data"]
                    except (httpx.TransportError, ValueError, KeyError):
                        time.sleep(0.1)

            missing = set(EXPRESSIONS) - {each for each in EXPRESSIONS if each.startswith("variable ")}
            missing -= {rule["alert"] for rule in ALERTS}
            is_read_again = False
            while missing:
                use(watched)
                if not is_read_again and ask("/query", query='up{job="qhub"} == 1')["result"]:
                    watched.service.engine.unload(watched.registry.resolve("alpha").content_digest, force=True)
                    is_read_again = True  # between two scrapes
                for title in list(missing):
                    query = EXPRESSIONS[title].replace("$job", "qhub").replace("$instance", ".+")
                    query = query.replace("$__rate_interval", "30s").replace("$__range", "30s")
                    values = [float(each["value"][1]) for each in ask("/query", query=query)["result"]]
                    if any(value == value for value in values):  # not NaN
                        missing.discard(title)
                assert time.monotonic() < deadline, missing
                time.sleep(0.2)
            rules = ask("/rules")["groups"][0]["rules"]
            while any(rule["health"] == "unknown" for rule in rules):
                rules = ask("/rules")["groups"][0]["rules"]
            assert {rule["name"]: (rule["health"], rule.get("lastError")) for rule in rules} == {
                rule["alert"]: ("ok", None) for rule in ALERTS
            }
    finally:
        process.terminate()
        process.wait()
