"""Train, push, wipe, pull, serve: the same content and the same tokens."""

import shutil
from pathlib import Path

from adapterhub_local.base.load import load_base
from adapterhub_local.base.store import BaseInfo, read_record
from adapterhub_local.hub import pull, push
from adapterhub_local.recipe import load_recipe
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from adapterhub_local.train.run import train
from tests.chats import write_recipe
from tests.hub_server import HubServer
from tests.serve.conftest import Server


def test_what_was_pushed_comes_back_and_answers_the_same(
    hub: HubServer, home: Home, tiny_base: BaseInfo, built_base: Path, tmp_path: Path
) -> None:
    """A trained version that went over the Hub into a new home has its digest and gives its tokens, base included."""
    version = train(load_recipe(write_recipe(tmp_path)), home)
    prompts = ["ab", "Say yes for a and no for b.\n\naaa", "bbbb"]
    before = Server(load_base(tiny_base, device="cpu"), Registry(home))
    texts = [before.complete(model="yes-no", prompt=prompt).json()["choices"][0]["text"] for prompt in prompts]
    plain = [before.complete(model="tiny", prompt=prompt).json()["choices"][0]["text"] for prompt in prompts]
    before.stop()
    push(Registry(home), "yes-no", "me/yes-no", token=hub.token, endpoint=hub.endpoint)

    shutil.rmtree(home.root)
    shutil.copytree(built_base, home.bases / "tiny")
    result = pull(Registry(home), "me/yes-no", endpoint=hub.endpoint)
    after = Server(load_base(read_record(home.bases / "tiny"), device="cpu"), Registry(home))
    again = [after.complete(model="yes-no", prompt=prompt).json()["choices"][0]["text"] for prompt in prompts]
    after.stop()

    assert result.version.content_digest == version.content_digest
    assert {**result.version.lineage, "pulled_from": None} == {**version.lineage, "pulled_from": None}
    assert again == texts
    assert texts != plain
