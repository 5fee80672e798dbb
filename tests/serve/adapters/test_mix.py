"""Mixes: a weighted sum of adapters asked for in a request answers as the adapter that `qhub merge` makes of it."""

import httpx
import pytest
import torch

from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.merge.merge import merge_to_registry
from adapterhub_local.merge.plan import make_plan
from adapterhub_local.registry import Registry, Version
from serve.adapters.mixture import MAX_TERMS, Mixture, mixture
from serve.engine.build import build_engine
from serve.engine.engine import Engine
from serve.engine.options import EngineOptions
from serve.engine.request import Request, SamplingParams
from serve.errors import BadParameter
from tests.serve.conftest import Server

PROMPT = "The quick brown fox"


@pytest.fixture(scope="module")
def engine(built_base) -> Engine:
    """An engine for what is compared here."""
    return build_engine(load_base(read_record(built_base), device="cpu"), EngineOptions(max_rows=8))


def answer(engine: Engine, *sources: Version | Mixture | None) -> list[tuple[list[int], list[float]]]:
    """Greedy tokens and log-probabilities of one prompt under each source, all in one batch."""
    params = SamplingParams(max_tokens=16, temperature=0, logprobs=0)
    requests = [
        Request(str(index), tuple(PROMPT.encode()), params, engine.pool.acquire(source).digest if source else None)
        for index, source in enumerate(sources)
    ]
    engine.submit(*requests)
    logprobs: dict[str, list[float]] = {request.id: [] for request in requests}
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            logprobs[output.request_id].append(output.sampled.logprob)
    return [(request.output, logprobs[request.id]) for request in requests]


@pytest.mark.parametrize(
    "weights",
    [{"alpha": 0.7, "beta": 0.3}, {"alpha": 1.5, "gamma": -0.5}, {"alpha": 0.4, "beta": -1.0, "gamma": 0.4}],
    ids=str,
)
def test_a_mix_is_the_merged_adapter(engine: Engine, served_registry: Registry, weights: dict[str, float]) -> None:
    """Different ranks, modules and scalings, negative weights: the answers are those of the merged version."""
    name = f"merged-{len(weights)}-{list(weights)[-1]}"
    plan = make_plan(list(weights), list(weights.values()), served_registry)
    merged, _ = merge_to_registry(plan, served_registry, name)
    mix = mixture([(served_registry.resolve(each), weight) for each, weight in weights.items()])
    assert isinstance(mix, Mixture)

    (tokens, logprobs), (wanted, expected), (base, _) = answer(engine, mix, merged, None)

    assert tokens == wanted
    assert logprobs == pytest.approx(expected, abs=1e-4)
    assert tokens != base


def test_identities(served_registry: Registry) -> None:
    """Order and spelling do not matter, equal contents add up, weight 0 is absent, weight 1 alone is the version."""
    alpha, beta = served_registry.resolve("alpha"), served_registry.resolve("beta")
    mix = mixture([(alpha, 0.7), (beta, 0.3)])
    assert mix is not None
    assert mix.content_digest == mixture([(beta, 0.3), (alpha, 0.7)]).content_digest
    assert mix.content_digest == mixture([(alpha, 0.35), (beta, 0.3), (alpha, 0.35)]).content_digest
    assert mix.content_digest != mixture([(alpha, 0.3), (beta, 0.7)]).content_digest
    assert mixture([(alpha, 1.0), (beta, 0.0)]) is alpha
    assert mixture([(alpha, 0.5), (alpha, -0.5)]) is None
    assert mixture([(alpha, 0.0)]) is None
    assert mixture([(alpha, 0.5)]).content_digest not in (alpha.content_digest, mix.content_digest)


def test_too_many_terms(served_registry: Registry) -> None:
    """A mix has a largest number of adapters."""
    alpha = served_registry.resolve("alpha")
    many = [(Version(f"x{i}", 1, alpha.created_at, alpha.files[: i % 2], alpha.lineage_file, {}), 1.0) for i in (0, 1)]
    assert isinstance(mixture(many), Mixture)  # by content: that is what counts
    assert mixture(many * MAX_TERMS).terms[0][1] == MAX_TERMS
    files = [alpha.files[0].__class__(f"f{i}", alpha.files[0].digest, 1) for i in range(MAX_TERMS + 1)]
    different = [(Version("x", 1, alpha.created_at, (file,), alpha.lineage_file, {}), 1.0) for file in files]
    with pytest.raises(BadParameter, match=str(MAX_TERMS)):
        mixture(different)


def test_scaled_factors_keep_the_delta(engine: Engine, served_registry: Registry) -> None:
    """The delta of a mix is the weighted sum of the parts' deltas, module by module."""
    alpha, beta = served_registry.resolve("alpha"), served_registry.resolve("beta")
    held = [engine.pool.acquire(one).digest for one in (alpha, beta, mixture([(alpha, 2.0), (beta, -0.25)]))]
    a, b, both = (engine.pool.get(digest) for digest in held)
    assert set(both) == set(a) | set(b)
    for module, (left, right) in both.items():
        expected = 2.0 * (a[module][0] @ a[module][1])
        if module in b:
            expected -= 0.25 * (b[module][0] @ b[module][1])
        torch.testing.assert_close(left @ right, expected, atol=1e-5, rtol=1e-4)
    for digest in held:
        engine.pool.release(digest)
    assert not any(engine.pool.users().values())


def chat(server: Server, **body) -> httpx.Response:
    return server.complete(prompt=PROMPT, max_tokens=12, **body)


def test_over_http(server: Server) -> None:
    """A mix as model, with the base's name before it, or as a field: the same answer, which says what it is made of."""
    spelled = chat(server, model="alpha@1*0.7+beta*0.3").json()
    named = {each["name"]: (each["version"], each["weight"]) for each in spelled["adapter"]["mix"]}
    assert named == {"alpha": (1, 0.7), "beta": (1, 0.3)}
    for other in (
        chat(server, model="tiny:beta*0.3+alpha*0.7"),
        chat(server, model="tiny", adapters=[{"ref": "alpha@prod", "weight": 0.7}, {"ref": "beta", "weight": 0.3}]),
    ):
        assert other.status_code == 200, other.text
        assert other.json()["choices"] == spelled["choices"]
        assert other.json()["system_fingerprint"] == spelled["system_fingerprint"]
    base = chat(server, model="tiny").json()
    nothing = chat(server, model="tiny", adapters=[{"ref": "alpha", "weight": 0}]).json()
    assert nothing["choices"] == base["choices"]
    assert nothing["adapter"] is None
    plain = chat(server, model="tiny", adapters=[{"ref": "alpha"}]).json()
    assert plain["adapter"] == chat(server, model="alpha").json()["adapter"]
    assert plain["choices"] == chat(server, model="alpha").json()["choices"]
    server.wait_until_idle()


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"model": "alpha*0.7+nobody*0.3"}, 404, "nobody"),
        ({"model": "alpha*x"}, 404, "weight"),
        ({"model": "alpha*nan"}, 404, "weight"),
        ({"model": "tiny", "adapters": [{"ref": "alpha*2"}]}, 400, "adapters"),
        ({"model": "tiny", "adapters": [{"ref": "../alpha"}]}, 404, "not a name"),
        ({"model": "tiny", "adapters": [{"ref": "alpha", "wieght": 1}]}, 400, "wieght"),
        ({"model": "beta", "adapters": [{"ref": "alpha"}]}, 404, "base that is served here is 'tiny'"),
    ],
    ids=str,
)
def test_mistakes_are_reported(server: Server, body: dict, status: int, message: str) -> None:
    """What cannot be mixed is refused by name, and nothing is held for it."""
    response = chat(server, **body)
    assert response.status_code == status, response.text
    assert message in response.json()["error"]["message"]
