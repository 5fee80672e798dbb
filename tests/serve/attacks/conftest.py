"""One server process for all attacks, with a base whose chat template has tools, and bad moments."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub_local.base.add import add_base
from adapterhub_local.registry import Registry
from adapterhub_local.settings import home as home_at
from tests.base.template_attacks import doubled
from tests.serve.adapter_makers import publish
from tests.serve.attacks.attacked import AttackedServer
from tests.serve.conftest import TOOL_TEMPLATE
from tests.tiny import save_tiny_model

# what a template does with a message that asks for it
BAD_MOMENTS = {
    "template: loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "template: billion": "{{ 'a' * 10**9 }}",
    "template: width": "{{ '%2000000000d' % 1 }}",
    "template: recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "template: doubled": doubled(60, "{{ ns.a == ns.b }}"),
    "template: long": "{% set a = 'a' * 999999 %}{% for i in range(60) %}{{ a }}{% endfor %}",
    "template: refusal": "{{ raise_exception('not this one') }}",
}
TEMPLATE = (
    "".join(f"{{% if messages[0].content == '{text}' %}}{act}{{% endif %}}" for text, act in BAD_MOMENTS.items())
    + TOOL_TEMPLATE
)


def make_home(folder: Path) -> Path:
    """A home with the base `tiny` and the adapter `alpha`."""
    home = home_at(folder / "home")
    base = add_base("tiny", save_tiny_model(folder / "model", chat_template=TEMPLATE), home, hub_id="some/tiny")
    publish(Registry(home), "alpha", base, seed=1, alias="prod")
    return home.root


@pytest.fixture(scope="session")
def attacked_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of the server that is attacked."""
    return make_home(tmp_path_factory.mktemp("attacked"))


@pytest.fixture(scope="session")
def attacked(attacked_home: Path, figures: list[str]) -> Iterator[AttackedServer]:
    """The server that is attacked; how long others waited meanwhile is printed at the end of the run."""
    running = AttackedServer(attacked_home)
    yield running
    figures.append(running.told())
    assert running.stop() == 0, running.log.read_text()[-2000:]
