"""Train, push, wipe, pull, serve: the same content and the same tokens."""

import shutil
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from adapterhub_local.base.bases import BaseInfo, read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.hub import pull, push
from adapterhub_local.recipe import load_recipe
from adapterhub_local.registry import Registry
from adapterhub_local.registry.fsck import verify
from adapterhub_local.settings import Home
from adapterhub_local.train.train import train
from tests.chats import write_recipe
from tests.hub_server import HubServer, Repo
from tests.serve.conftest import Server


def test_what_peft_saved_is_pulled_and_served(
    hub: HubServer, registry: Registry, home: Home, tiny_base: BaseInfo, tmp_path: Path
) -> None:
    """A repository made by PEFT's own save_pretrained, confirmed to be for a base, answers as PEFT does."""
    base = load_base(tiny_base, device="cpu")
    torch.manual_seed(5)
    model = get_peft_model(base.model, LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", use_rslora=True))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "saved")
    hub.repos["them/theirs"] = repo = Repo()
    repo.commit({path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir() if path.is_file()})

    result = pull(registry, "them/theirs", base="tiny", endpoint=hub.endpoint)
    ids = base.tokenizer("Hello", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        wanted = model.eval().generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    server = Server(load_base(tiny_base, device="cpu"), registry)
    answer = server.complete(model="theirs", prompt="Hello").json()["choices"][0]["text"]
    server.stop()

    assert (result.matched_by, verify(registry, result.version)) == ("shapes, confirmed", [])
    assert answer == base.tokenizer.decode(wanted, skip_special_tokens=True)


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
