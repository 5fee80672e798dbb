"""S3 itself refuses (moto with its access control on): each reason in a sentence of its own, within ten seconds."""

import time
from collections.abc import Iterator

import boto3
import httpx
import pytest
from click.testing import CliRunner
from moto.server import ThreadedMotoServer

from adapterhub_local.cli.main import qhub
from adapterhub_local.errors import NotFound, QhubError, RemoteError
from adapterhub_local.registry import Registry
from adapterhub_local.registry.remotes import Remote, add_remote
from adapterhub_local.registry.store import open_store
from adapterhub_local.settings import home
from tests.patience import PATIENCE
from tests.stores import LINEAGE, files

FULL = '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}'
READ = FULL.replace('"Action": "*"', '"Action": ["s3:ListBucket", "s3:GetObject"]')
NONE = FULL.replace("Allow", "Deny")


class Keys:
    """An S3 server that asks who somebody is, and the keys of users with these rights."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        whole = {"endpoint_url": endpoint, "region_name": "us-east-1"}
        whole |= {"aws_access_key_id": "root", "aws_secret_access_key": "root"}
        boto3.client("s3", **whole).create_bucket(Bucket="bucket")
        iam, self.of = boto3.client("iam", **whole), {}
        for name, policy in (("all", FULL), ("reads", READ), ("nothing", NONE)):
            iam.create_user(UserName=name)
            iam.put_user_policy(UserName=name, PolicyName="p", PolicyDocument=policy)
            made = iam.create_access_key(UserName=name)["AccessKey"]
            self.of[name] = (made["AccessKeyId"], made["SecretAccessKey"])
        httpx.post(f"{endpoint}/moto-api/reset-auth", content=b"0", trust_env=False).raise_for_status()


@pytest.fixture(scope="module")
def s3() -> Iterator[Keys]:
    """The server."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield Keys(f"http://{host}:{port}")
    finally:
        httpx.post(f"http://{host}:{port}/moto-api/reset-auth", content=b"inf", trust_env=False)
        server.stop()


def use(monkeypatch: pytest.MonkeyPatch, identity: str, secret: str) -> None:
    """The keys that the environment has."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", identity)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


CASES = {
    "wrong key": ("AKIAUNKNOWNUNKNOWN00", None, "bucket", "the access key is not known there"),
    "wrong secret": (None, "x" * 40, "bucket", "the secret key does not belong to the access key"),
    "no bucket": (None, None, "nothing", "there is no such bucket"),
}


@pytest.mark.parametrize("work", ["size", "names", "put"])
@pytest.mark.parametrize("case", CASES)
def test_keys(s3: Keys, case: str, work: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that is not known, a secret that is not its own, a bucket that is not there: whatever is asked for."""
    identity, secret, bucket, words = CASES[case]
    use(monkeypatch, identity or s3.of["all"][0], secret or s3.of["all"][1])
    store = open_store(Remote("team", f"s3://{bucket}/some", {"endpoint_url": s3.endpoint}))
    ask = {"size": lambda: store.size("a"), "names": lambda: store.names("a"), "put": lambda: store.put("a", b"x")}
    if (case, work) == ("no bucket", "size"):
        assert ask[work]() is None  # an answer to HEAD is the same for both
        return
    before = time.monotonic()
    with pytest.raises(QhubError, match=words) as refused:
        ask[work]()
    assert time.monotonic() - before < PATIENCE  # 10 s where nothing else runs
    assert isinstance(refused.value, NotFound if case == "no bucket" else RemoteError)


@pytest.mark.parametrize(("who", "verb"), [("reads", "push"), ("nothing", "push"), ("nothing", "pull")])
def test_rights(s3: Keys, who: str, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who may only read is told so on push, who may do nothing on both, by the command and with exit code 1."""
    Registry().publish("a", files(1), LINEAGE)
    add_remote(home(), "team", "s3://bucket/rights", {"endpoint_url": s3.endpoint})
    use(monkeypatch, *s3.of[who])
    done = CliRunner().invoke(qhub, ["sync", verb, "team", "a"])
    assert done.exit_code == 1
    assert "these keys are not allowed to do this: they need s3:ListBucket, s3:GetObject and s3:PutObject" in str(
        done.exception
    )


def test_with_rights(s3: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the same control, keys with the rights that the sentence names push and pull."""
    Registry().publish("a", files(1), LINEAGE)
    add_remote(home(), "team", "s3://bucket/whole", {"endpoint_url": s3.endpoint})
    use(monkeypatch, *s3.of["all"])
    assert CliRunner().invoke(qhub, ["sync", "push", "team", "a"]).exit_code == 0
    use(monkeypatch, *s3.of["reads"])
    assert CliRunner().invoke(qhub, ["sync", "pull", "team", "a"]).exit_code == 0


def test_no_keys(s3: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any keys the sentence says which variables to set."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, "/nothing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    store = open_store(Remote("team", "s3://bucket/some", {"endpoint_url": s3.endpoint}))
    with pytest.raises(RemoteError, match="there are no keys for it: set AWS_ACCESS_KEY_ID"):
        store.names("a")
