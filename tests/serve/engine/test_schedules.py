"""Random schedules: whatever happens in whatever order, a request only ever sees its own adapter's weights and keys.

python -m tests.serve.engine.test_schedules 100000    # so many random events, about a quarter of an hour
"""

import random
import sys
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from adapterhub_local.base.bases import BaseInfo, read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.registry import Registry
from adapterhub_local.settings import home as home_at
from serve.adapters.mixture import Mixture, mixture
from serve.engine.build import build_engine
from serve.engine.engine import Engine
from serve.engine.options import EngineOptions
from serve.engine.pages import PAGE
from serve.engine.request import Request, SamplingParams
from serve.errors import Busy
from tests.serve.adapter_makers import publish
from tests.serve.engine.test_scheduler import check_pages

SHARED = tuple(
    random.Random(0).choices(range(250), k=70)
)  # prompts are beginnings of it, some with an end of their own
RANKS = (3, 3, 8, 8, 1, 5)  # of the contents that names may point to
DORA = (1, 5)  # of these, those that rescale the base
NAMES = 4
PAGE_BYTES = PAGE * 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, head_dim, float32


class World:
    """A base, versions, the engine under test and one that answers each request alone and remembers nothing."""

    def __init__(self, base: BaseInfo, registry: Registry) -> None:
        self.versions = [
            publish(registry, f"s{seed}", base, seed=80 + seed, rank=rank, dora=seed in DORA)
            for seed, rank in enumerate(RANKS)
        ]
        limits = EngineOptions(max_rows=4, tokens_per_step=24, max_adapters=3, queue_limit=12, max_length=128)
        limits = replace(limits, kv_bytes=8 * PAGE_BYTES)  # the longest request needs all of them
        alone = EngineOptions(max_rows=1, prefix_bytes=0, max_length=128)
        self.engine = build_engine(load_base(base, device="cpu"), limits)
        self.engine.scheduler.max_scored = 10
        self.oracle = build_engine(load_base(base, device="cpu"), alone)
        held = self.engine.pool.acquire(self.versions[2]).digest
        self.engine.pool.max_bytes = 4 * self.engine.pool.num_bytes  # most contents have to make room for others
        self.engine.pool.release(held)
        self.alone = cache(self._alone)
        self.num_events = 0

    def source(self, which: int | tuple[int, int] | None) -> object:
        """A version, a mix of two, or the base."""
        if which is None:
            return None
        if isinstance(which, int):
            return self.versions[which]
        return mixture([(self.versions[which[0]], 0.75), (self.versions[which[1]], -0.5)])

    def _alone(
        self, which: int | tuple[int, int] | None, prompt: tuple[int, ...], max_tokens: int, num_best: int | None
    ) -> tuple[list[int], list[float]]:
        request = make_request(self.oracle, "alone", self.source(which), prompt, max_tokens, num_best)
        self.oracle.submit(request)
        while self.oracle.has_work:
            self.oracle.step()
        return request.output, prompt_logprobs(request)


def make_request(
    engine: Engine, name: str, source, prompt: tuple[int, ...], max_tokens: int, num_best: int | None = None
) -> Request:
    adapter = engine.pool.acquire(source).digest if source else None
    params = SamplingParams(max_tokens=max_tokens, temperature=0, prompt_logprobs=num_best)
    return Request(name, prompt, params, adapter)


def prompt_logprobs(request: Request) -> list[float]:
    return [logprob for part in request.scores for logprob in part.logprobs]


class Schedules(RuleBasedStateMachine):
    """Submit, step, abort, swap, evict, pin, preempt, unload and republish in any order."""

    world: ClassVar[World]

    def __init__(self) -> None:
        super().__init__()
        self.engine = self.world.engine
        self.clear()  # of what an example that failed has left
        self.names: list = list(range(NAMES))  # name -> the content it points to
        self.live: dict[str, tuple[Request, tuple]] = {}
        self.unloaded: set[str] = set()  # requests that ended with their adapter
        self.pinned: str | None = None
        self.count = 0

    def clear(self) -> None:
        for name in [record.digest for record in self.engine.pool.records.all() if record.holders]:
            self.engine.unkeep(name, "pin")
        for request_id in list(self.engine._requests):
            self.engine.abort(request_id)
        while self.engine.has_work:
            self.engine.step()
        for record in self.engine.pool.records.all():
            record.users = 0

    @rule(
        name=st.one_of(st.none(), st.integers(0, NAMES - 1)),
        length=st.sampled_from([1, 9, 17, 25, 33, 49, len(SHARED)]),
        end=st.sampled_from([(), (7,), (9, 9)]),
        max_tokens=st.sampled_from([1, 3, 18, 56]),
        num_best=st.sampled_from([None, None, 0, 2]),
    )
    def submit(
        self, name: int | None, length: int, end: tuple[int, ...], max_tokens: int, num_best: int | None
    ) -> None:
        which = None if name is None else self.names[name]
        prompt = SHARED[: -(-length // 8) * 8] + end
        try:
            source = self.world.source(which)
            request = make_request(self.engine, f"r{self.count}", source, prompt, max_tokens, num_best)
        except Busy:
            return
        try:
            self.engine.submit(request)
        except Busy:
            if request.adapter:
                self.engine.pool.release(request.adapter)
            return
        self.count += 1
        self.live[request.id] = (request, (which, prompt, max_tokens, num_best))

    @rule(count=st.sampled_from([1, 2, 4, 8, 16]))
    def step(self, count: int) -> None:
        for _ in range(count):
            for output in self.engine.step():
                if output.error:
                    assert output.request_id in self.unloaded, output.error
                elif output.is_last:
                    request, asked = self.live.pop(output.request_id)
                    output, logprobs = self.world.alone(*asked)
                    assert request.output == output, asked
                    assert prompt_logprobs(request) == pytest.approx(logprobs, abs=1e-4), asked

    @rule(which=st.integers(0, 40))
    def abort(self, which: int) -> None:
        if self.live:
            request_id = sorted(self.live)[which % len(self.live)]
            self.engine.abort(request_id)
            del self.live[request_id]

    @rule(name=st.integers(0, NAMES - 1), content=st.integers(0, len(RANKS) - 1), other=st.integers(0, len(RANKS)))
    def republish(self, name: int, content: int, other: int) -> None:
        self.names[name] = content if other >= len(RANKS) or other == content else (content, other)

    @rule(content=st.integers(0, len(RANKS) - 1), force=st.booleans())
    def unload(self, content: int, force: bool) -> None:
        digest = self.world.versions[content].content_digest
        users = {request.id for request, _ in self.live.values() if request.adapter == digest}
        holders = [request for request in self.engine._requests.values() if request.adapter == digest]
        freed = self.engine.unload(digest, force=force)
        if digest == self.pinned:  # the server keeps this from being asked for; it is to be survived
            digest = ""
        if holders and not force:
            assert freed == 0
            return
        assert digest not in self.engine.slots
        assert digest not in self.engine.pool.users()
        self.unloaded |= users
        for request_id in users:
            del self.live[request_id]

    @rule(content=st.integers(0, len(RANKS) - 1), is_pinned=st.booleans())
    def pin(self, content: int, is_pinned: bool) -> None:
        """Pin one content, in place of another, or none."""
        try:
            digest = self.engine.pool.acquire(self.world.versions[content]).digest if is_pinned else None
        except Busy:
            return
        if digest is not None:
            try:
                self.engine.keep(digest, "pin", pinned=True)
            except Busy:
                self.engine.release(digest)
                return
        if self.pinned and self.pinned != digest:
            self.engine.unkeep(self.pinned, "pin")
        self.pinned = digest

    @rule(share=st.sampled_from([0, 3, 1000]))
    def evict(self, share: int) -> None:
        """Fewer pages for what is remembered, from now on."""
        self.engine.pages.max_idle = share
        self.engine.pages.trim()

    @invariant()
    def rows_and_leases_are_right(self) -> None:
        self.world.num_events += 1
        check_pages(self.engine.pages, self.engine.scheduler.running)
        holders = [request.adapter for request in self.engine._requests.values() if request.adapter]
        for digest, users in self.engine.pool.users().items():
            assert users == holders.count(digest) + (digest == self.pinned)
        assert len(self.engine.slots) <= 3

    def teardown(self) -> None:
        while self.engine.has_work:
            self.step(1)
        assert not self.live
        assert not self.engine._requests
        self.pin(0, is_pinned=False)
        assert not any(self.engine.pool.users().values())
        assert self.engine.pages.num_used == 0


def run(world: World, examples: int, steps: int) -> None:
    Schedules.world = world
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    run_state_machine_as_test(
        Schedules,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, database=None, suppress_health_check=checks
        ),
    )


def test_random_schedules(built_base: Path, home) -> None:
    """In a few hundred random events every finished answer is the one its adapter gives alone, and nothing leaks."""
    world = World(read_record(built_base), Registry(home))
    run(world, 12, 40)
    assert world.num_events > 50
    assert world.engine.stats.num_sampled > 50


def test_unload_frees_what_it_says(built_base: Path, home) -> None:
    """Unloading gives back slot and memory in bytes; in use it stays, or is forced with an error for who used it."""
    engine = (world := World(read_record(built_base), Registry(home))).engine
    version = world.versions[0]
    request = make_request(engine, "r", version, SHARED[:5], 9)
    engine.submit(request)
    engine.step()
    before = engine.pool.num_bytes + engine.slots.num_bytes
    assert engine.unload(version.content_digest) == 0
    assert version.content_digest in engine.slots
    freed = engine.unload(version.content_digest, force=True)
    assert freed > 0
    assert engine.pool.num_bytes + engine.slots.num_bytes == before - freed
    outputs = engine.step()
    assert [output.request_id for output in outputs if output.error] == ["r"]
    assert not engine.has_work
    assert engine.unload(version.content_digest) == 0
    assert isinstance(mixture([(version, 2.0)]), Mixture)


if __name__ == "__main__":
    from adapterhub_local.base.add import add_base
    from tests.tiny import save_tiny_model

    torch.set_num_threads(1)
    wanted = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        place = home_at(Path(folder))
        base = add_base("tiny", save_tiny_model(Path(folder) / "model"), place)
        everything = World(base, Registry(place))
        while everything.num_events < wanted:
            run(everything, 20, 200)
        sys.stdout.write(f"{everything.num_events} events, {everything.engine.stats}\n")
