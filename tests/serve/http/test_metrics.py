"""What /metrics counts: requests, tokens, times and errors, by adapter and key, and how many lines that may be."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.registry import Registry
from serve import usage
from serve.course import Course
from serve.metrics import MAX_ADAPTER_LABELS, Metrics
from tests.serve.adapter_makers import publish
from tests.serve.conftest import Server


@pytest.fixture(scope="module")
def measured(built_base, tmp_path_factory: pytest.TempPathFactory):
    """A server with two adapters in a registry of its own."""
    registry = Registry(tmp_path_factory.mktemp("measured"))
    base = read_record(built_base)
    publish(registry, "alpha", base, seed=1, rank=8)
    publish(registry, "beta", base, seed=2, rank=4)
    running = Server(load_base(base, device="cpu"), registry)
    yield running
    running.stop()


def test_metrics(measured: Server) -> None:
    """Counts of requests and tokens by adapter grow by what was asked; the gateway's gauges are there."""
    before = measured.samples()
    measured.complete(model="alpha", prompt="Hello", max_tokens=7, ignore_eos=True)
    measured.complete(model="tiny", prompt="Hello", max_tokens=5, ignore_eos=True)
    measured.complete(model="nothing", prompt="Hello")
    after = measured.samples()

    def grown(*key: str) -> float:
        return after[key] - before.get(key, 0)

    assert grown("qhub_tokens_total", "alpha", "completion") == 7
    assert grown("qhub_tokens_total", "alpha", "prompt") == 5
    assert grown("qhub_tokens_total", "completion", "tiny") == 5
    assert grown("qhub_http_requests_total", "/v1/completions", "200", "POST") == 2
    assert grown("qhub_http_requests_total", "/v1/completions", "404", "POST") == 1
    assert grown("qhub_answers_total", "length") == 2
    assert grown("qhub_time_to_first_token_seconds_count") == 2
    assert after[("qhub_adapters_loaded",)] >= 1
    assert after[("qhub_adapter_slots_total",)] >= after[("qhub_adapter_slots_used",)] >= 1
    assert after[("qhub_adapter_loads_total",)] >= after[("qhub_adapter_load_seconds_count",)] >= 1
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
        assert after[(name,)] == 0


def test_labels_are_bounded(measured: Server) -> None:
    """However many adapters are asked for by however many keys, and however they fail, lines are bounded, and the
    sums are right."""
    metrics = Metrics(measured.service.engine.snapshot)
    num_adapters = usage.MAX_USED + 50
    for number in range(num_adapters):
        name = f"adapter{number}"
        course = Course(label=name, names=(name,), num_prompt=1, num_completion=1, reasons=["stop"])
        course.ready = course.begun = course.first = course.last = 1.0
        for key in (f"{number:08x}", "00000000"):
            metrics.note_answer(course, key, 0.5, 2.0)
        for status in (500, 503):
            metrics.note_error(course, status)
    found = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                found.setdefault(sample.name, []).append(sample)
    limits = {
        "qhub_tokens_total": 2 * (MAX_ADAPTER_LABELS + 1),
        "qhub_usage_requests_total": usage.MAX_USED + usage.MAX_KEYS + 2,
        "qhub_usage_tokens_total": 2 * (usage.MAX_USED + usage.MAX_KEYS + 2),
        "qhub_adapter_first_token_seconds_bucket": (usage.MAX_TIMED + 1) * (len(usage.FIRST_SECONDS) + 1),
        "qhub_adapter_answer_seconds_bucket": (usage.MAX_TIMED + 1) * (len(usage.ANSWER_SECONDS) + 1),
        "qhub_errors_total": usage.MAX_FAILED + 2,
    }
    for name, limit in limits.items():
        assert len(found[name]) <= limit, name
    assert sum(each.value for each in found["qhub_usage_requests_total"]) == 2 * num_adapters
    assert sum(each.value for each in found["qhub_usage_tokens_total"]) == 4 * num_adapters
    assert sum(each.value for each in found["qhub_errors_total"]) == 2 * num_adapters
    assert sum(each.value for each in found["qhub_adapter_answer_seconds_count"]) == 2 * num_adapters
    (busy,) = {each.labels["key"] for each in found["qhub_usage_requests_total"]} & {"00000000"}
    own = [each.value for each in found["qhub_usage_requests_total"] if each.labels["key"] == busy]
    assert sum(own) == num_adapters + 1
    assert {each.labels["adapter"] for each in found["qhub_adapter_first_token_seconds_count"]} >= {"other", "adapter0"}


def test_an_adapter_named_other_is_counted_with_the_others(measured: Server) -> None:
    """Its label would be shown to a key for it alone, with what is counted for all beyond the bounds."""
    metrics = Metrics(measured.service.engine.snapshot)
    metrics.note_answer(Course(label="other", names=("other",), num_prompt=1, reasons=["stop"]), None, 0.0, 1.0)
    assert 'qhub_tokens_total{adapter="other"' in metrics.text().decode()
    assert 'adapter="other"' not in metrics.text(lambda name: name == "other").decode()


def test_usage_latency_and_errors(measured: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was asked of whom without a key, how long it took, and how it failed, before an answer began and after."""
    before = measured.samples()
    measured.complete(model="alpha", prompt="Hello", max_tokens=7, ignore_eos=True)
    measured.complete(model="alpha", prompt="Hello", max_tokens="many")  # not read: it came to no adapter
    measured.complete(model="no-such-name", prompt="Hello")
    measured.slow_down(monkeypatch)
    body = {"model": "beta", "prompt": "Hello", "max_tokens": 90, "ignore_eos": True, "stream": True}
    with measured.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        monkeypatch.setattr(measured.service.engine, "step", lambda: measured.service.engine.fail_all())
        assert any("error" in line for line in lines)
    monkeypatch.undo()
    measured.wait_until_idle()
    after = measured.samples()

    def grown(*key: str) -> float:
        return after[key] - before.get(key, 0)

    assert grown("qhub_usage_requests_total", "alpha", "none") == 1
    assert grown("qhub_usage_requests_total", "beta", "none") == 1
    assert grown("qhub_usage_tokens_total", "alpha", "completion", "none") == 7
    assert grown("qhub_usage_tokens_total", "alpha", "none", "prompt") == 5
    assert grown("qhub_adapter_first_token_seconds_count", "alpha") == 1
    assert grown("qhub_adapter_first_token_seconds_bucket", "+Inf", "beta") == 1
    assert grown("qhub_adapter_answer_seconds_count", "alpha") == 1
    assert grown("qhub_adapter_answer_seconds_count", "beta") == 0
    assert grown("qhub_queue_seconds_count") == 2
    assert grown("qhub_errors_total", "-", "400") >= 1
    assert grown("qhub_errors_total", "-", "404") == 1
    assert grown("qhub_errors_total", "500", "beta") == 1
    assert not any("no-such-name" in key for key in after)
    assert after[("qhub_ready",)] == 1
