"""Adapters with rows of the embeddings of their own: each request has its adapter's, whatever runs beside it."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.load import load_base
from adapterhub_local.errors import BadFile, Incompatible
from adapterhub_local.lora.adapter import open_adapter
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from serve.adapters.mixture import mixture
from serve.engine.build import build_engine
from serve.engine.engine import Engine
from serve.engine.graphs import Graphs
from serve.engine.options import EngineOptions
from serve.engine.request import Request, SamplingParams
from serve.kernels.choose import Kernels
from serve.lora.rows import rows_of
from tests.serve import adapter_makers
from tests.token_adapters import EMBEDDINGS, base_of_kind, loaded_by_peft, logits_of, publish, register, save_tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
PROMPT = (5, 64, 9, 257, 64, 70, 3, 12)
# name -> what rows it has; "own head" has some of the head alone
KINDS = {
    "list": [64, 257],
    "dict": {"embed_tokens": [64, 9, 3]},
    "both": {"embed_tokens": [257], "lm_head": [64, 11]},
    "own head": {"lm_head": [64, 257, 100]},
}


@pytest.fixture(scope="module", params=["tied", "untied"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[BaseInfo, Registry, Path]:
    """A base of each kind with the adapters of the table, a plain one and one with DoRA; and a folder."""
    folder = tmp_path_factory.mktemp(request.param)
    home = Home(folder / "home")
    info, registry = base_of_kind(request.param, home, folder), Registry(home)
    for seed, (name, indices) in enumerate(KINDS.items()):
        publish(registry, name.replace(" ", "-"), info, folder, indices, seed)
    adapter_makers.publish(registry, "plain", info, seed=7)
    adapter_makers.publish(registry, "dora", info, seed=8, dora=True)
    return info, registry, folder


def answer(engine: Engine, *sources, tokens: int = 6) -> list[tuple[list[int], list[float]]]:
    """Greedy tokens and log-probabilities of the prompt under each source, all in one batch."""
    params = SamplingParams(max_tokens=tokens, temperature=0, logprobs=0)
    digests = [engine.pool.acquire(source).digest if source else None for source in sources]
    requests = [Request(str(index), PROMPT, params, digest) for index, digest in enumerate(digests)]
    engine.submit(*requests)
    logprobs: dict[str, list[float]] = {request.id: [] for request in requests}
    while engine.has_work:
        for output in engine.step():
            assert output.error is None, output.error
            logprobs[output.request_id].append(output.sampled.logprob)
    return [(request.output, logprobs[request.id]) for request in requests]


def answer_by_peft(info: BaseInfo, folder: Path | None, tokens: int) -> tuple[list[int], list[float]]:
    """The same by PEFT, a token at a time."""
    model = loaded_by_peft(info, folder)
    ids, found = list(PROMPT), []
    for _ in range(tokens):
        row = torch.log_softmax(logits_of(model, ids)[-1], -1)
        ids.append(int(row.argmax()))
        found.append(float(row.max()))
    return ids[len(PROMPT) :], found


def engine_of(info: BaseInfo, **options) -> Engine:
    return build_engine(load_base(info, device="cpu"), EngineOptions(**{"max_rows": 8, "max_adapters": 8, **options}))


@pytest.mark.parametrize("options", [{}, {"kernels": "torch", "base_exec": "nf4"}, {"max_adapters": 2}], ids=str)
def test_a_mixed_batch_answers_as_peft(place: tuple[BaseInfo, Registry, Path], options: dict) -> None:
    """Every kind of rows, a plain adapter, DoRA and the base in one batch: each has PEFT's tokens, and no others'."""
    info, registry, _ = place
    engine = engine_of(info, **options)
    names = [*(name.replace(" ", "-") for name in KINDS), "plain", "dora"]
    versions = [registry.resolve(name) for name in names]
    found = answer(engine, *versions, None)
    for name, version, (tokens, logprobs) in zip([*names, "base"], [*versions, None], found, strict=True):
        wanted, expected = answer_by_peft(info, version.path if version else None, len(tokens))
        assert tokens == wanted, name
        assert logprobs == pytest.approx(expected, abs=2e-4), name
    assert len({tuple(tokens) for tokens, _ in found}) >= 5, "they must differ, or this shows nothing"
    (alone,) = answer(engine_of(info, **options), None)
    assert found[-1][0] == alone[0]


def test_who_gets_the_slot_next_has_no_rows_in_it(place: tuple[BaseInfo, Registry, Path]) -> None:
    """One slot for all: a plain adapter after one with rows answers as in an engine of its own, and memory is freed."""
    info, registry, _ = place
    engine = engine_of(info)
    few = engine_of(info, max_rows=2, max_adapters=1, kernels="torch")  # whose slots are copies, as on a GPU
    wanted = [answer(engine, registry.resolve(name))[0][0] for name in ("list", "plain", "both")]
    found = [answer(few, registry.resolve(name))[0][0] for name in ("list", "plain", "both")]
    assert found == wanted
    version = registry.resolve("list")
    held = few.pool.get(few.pool.acquire(version).digest)
    rows = rows_of(held)
    assert rows is not None
    before = few.slots.num_bytes
    answer(few, version)
    assert few.slots.num_bytes == before - rows_of(few.pool.get(registry.resolve("both").content_digest)).nbytes + (
        rows.nbytes
    )


def test_steps_that_are_captured_leave_rows_out(place: tuple[BaseInfo, Registry, Path]) -> None:
    """A batch with such an adapter runs as ever; without one it is captured, and gives the same."""
    info, registry, _ = place
    versions = registry.resolve("list"), registry.resolve("plain")
    wanted = answer(engine_of(info), *versions)
    engine = engine_of(info, kernels="torch")
    kernels = engine.runner.context.kernels = Kernels({})
    runner = engine.runner
    graphs = runner.graphs = Graphs(
        runner.model, runner.cache, runner.context, engine.slots, kernels, engine.max_length,
        is_captured=False, settled=0,
    )  # fmt: skip
    assert answer(engine, versions[0])[0][0] == wanted[0][0]
    assert len(graphs) == 0
    assert [tokens for tokens, _ in answer(engine, *versions)] == [tokens for tokens, _ in wanted]
    assert [tokens for tokens, _ in answer(engine, versions[1])] == [wanted[1][0]]
    assert len(graphs) > 0


def test_a_mix_is_the_sum_of_changes(place: tuple[BaseInfo, Registry, Path]) -> None:
    """base + sum of w_i (row_i - base) over the union of tokens; one that lacks a token has the base's row there."""
    info, registry, _ = place
    engine = engine_of(info)
    terms = [(registry.resolve(name), weight) for name, weight in (("list", 0.6), ("dict", -0.5), ("plain", 0.3))]
    mix = mixture(terms)
    rows = rows_of(engine.pool.get(engine.pool.acquire(mix).digest))
    weight = load_base(info, device="cpu").model.get_input_embeddings().weight.detach()
    wanted = weight.clone()
    for version, share in terms[:2]:
        adapter = open_adapter(version.path, tokens=True)
        ids = list(adapter.tokens[EMBEDDINGS].ids)
        wanted[ids] += share * (adapter.rows(EMBEDDINGS) - weight[ids])
    assert rows is not None
    assert rows.inputs is not None
    assert rows.inputs.ids.tolist() == [3, 9, 64, 257]
    torch.testing.assert_close(rows.inputs.vectors, wanted[[3, 9, 64, 257]], atol=1e-5, rtol=1e-5)
    assert (rows.outputs is None) == (not load_base(info, device="cpu").model.config.tie_word_embeddings)
    assert answer(engine, mix)[0][0] != answer(engine, None)[0][0]


def test_rows_alone_are_an_effect(place: tuple[BaseInfo, Registry, Path], tmp_path: Path) -> None:
    """An adapter whose factors are zero is served if its rows differ from the base's, and is nothing if they do not."""
    info, registry, _ = place
    engine = engine_of(info)
    for strength in (1.0, 0.0):
        folder = save_tokens(info, tmp_path / f"in-{strength}", [64, 257], 5, strength=strength, lora_alpha=0)
        version = register(registry, f"still{strength:.0f}", info, folder)
        if strength:
            assert answer(engine, version)[0][0] == answer_by_peft(info, version.path, 6)[0]
        else:
            with pytest.raises(Incompatible, match="changes nothing"):
                engine.pool.acquire(version)


BROKEN = {
    "a token beyond the vocabulary": (
        [64, 5000],
        "has a row for token 5000 in .*embed_tokens, and base 'tiny' has 320",
    ),
    "a token twice": ([64, 64], "names token 64 twice"),
    "a negative token": ([64, -1], "neither a list of tokens' ids"),
    "fewer tokens than rows": ([64], "is \\[2, 64\\], and its config names 1 tokens"),
    "no tokens": (None, "does not say of which tokens"),
    "another module": ({"lm_head": [64, 257]}, "does not say of which tokens"),
    "one more module": ({"embed_tokens": [64, 257], "lm_head": [1]}, "names tokens of lm_head, and it has no rows"),
    "not numbers": (["64", "257"], "neither a list of tokens' ids"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_fit_is_refused(place: tuple[BaseInfo, Registry, Path], tmp_path: Path, name: str) -> None:
    """A config that says other tokens than there are rows for is refused with one sentence, added or served."""
    info, registry, folder = place
    indices, reason = BROKEN[name]
    broken = tmp_path / "broken"
    shutil.copytree(folder / "list-0", broken)
    config = json.loads((broken / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps({**config, "trainable_token_indices": indices}))
    with pytest.raises((BadFile, Incompatible), match=reason) as told:
        register(registry, "broken", info, broken)
    assert "\n" not in str(told.value)
