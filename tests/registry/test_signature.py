"""Signed versions: with a key file, offline, over the Hub and back, refused when bytes or keys are others."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from adapterhub_local.cli.sign import command as sign_command
from adapterhub_local.cli.verify import command as verify_command
from adapterhub_local.errors import Corrupt, InputError, NotFound, QhubError
from adapterhub_local.hub import pull
from adapterhub_local.hub.package import MANIFEST
from adapterhub_local.lora.config import WEIGHTS
from adapterhub_local.registry import Registry
from adapterhub_local.registry.signature import SIGNATURE, sign, signature_of, verify_signature
from adapterhub_local.settings import Home, trusted_keys
from tests.hub_adapters import REPO, is_untouched, peft_files, publish, pulled, pushed
from tests.hub_server import HubServer, Repo

pytest.importorskip("model_signing", reason="the extra `sign` is not installed")


def make_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """A new elliptic-curve pair, private and public."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    kind = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, kind))
    return private, public


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, tuple[Path, Path]]:
    """The team's pair and a stranger's."""
    return {name: make_keys(tmp_path, name) for name in ("team", "stranger")}


def test_signed_version_verifies_with_its_key_only(registry: Registry, keys) -> None:
    """A signature holds for the key and the bytes it was made with, and says which of several keys it was."""
    version = publish(registry)
    with pytest.raises(NotFound, match="sentiment@1 is not signed"):
        verify_signature(registry, version, [keys["team"][1]])
    sign(registry, version, keys["team"][0])

    assert verify_signature(registry, version, [keys["stranger"][1], keys["team"][1]]) == keys["team"][1]
    with pytest.raises(Corrupt, match="the signature of sentiment@1 does not hold"):
        verify_signature(registry, version, [keys["stranger"][1]])
    assert list(registry.home.tmp.iterdir()) == []


def test_other_tools_verify_the_signature(registry: Registry, keys, tmp_path: Path) -> None:
    """OpenSSF's own command accepts it over the version's files, and no longer when one is changed."""
    version = publish(registry)
    signature = sign(registry, version, keys["team"][0])
    folder = Path(shutil.copytree(version.path, tmp_path / "copy"))
    command = ["model_signing", "verify", "key", str(folder), "--signature", str(signature)]
    command += ["--public_key", str(keys["team"][1])]
    from model_signing._cli import main

    whole = CliRunner().invoke(main, command[1:])
    (folder / WEIGHTS).chmod(0o644)
    (folder / WEIGHTS).write_bytes(b"other")
    changed = CliRunner().invoke(main, command[1:])

    assert (whole.exit_code, changed.exit_code) == (0, 1), whole.output


def test_signature_of_another_version_is_refused(registry: Registry, keys) -> None:
    """A good signature put beside other content does not hold there."""
    first, second = publish(registry), publish(registry, seed=1)
    path = sign(registry, first, keys["team"][0])
    shutil.copy(path, path.with_name(f"{second.content_digest.removeprefix('sha256:')}.sig"))

    with pytest.raises(Corrupt, match="does not hold"):
        verify_signature(registry, second, [keys["team"][1]])


def test_policy_takes_only_what_is_signed(
    hub: HubServer, registry: Registry, home: Home, keys, monkeypatch, tmp_path: Path
) -> None:
    """With trusted keys a signed push comes back with its signature; unsigned, foreign or plain ones are refused."""
    version = publish(registry)
    sign(registry, version, keys["team"][0])
    pushed(hub, registry)
    publish(registry, seed=1)
    pushed(hub, registry)
    assert [SIGNATURE in hub.repos[REPO].files(tag) for tag in ("v1", "v2")] == [True, False]
    shutil.rmtree(home.root)
    fresh = Registry(home)
    monkeypatch.setenv("QHUB_TRUSTED_KEYS", str(keys["stranger"][1]))
    with pytest.raises(Corrupt, match="does not hold"):
        pulled(hub, fresh, revision="v1")
    monkeypatch.setenv("QHUB_TRUSTED_KEYS", f"{keys['stranger'][1]}:{keys['team'][1]}")
    with pytest.raises(Corrupt, match=r"is not signed: nothing was registered.*QHUB_TRUSTED_KEYS"):
        pulled(hub, fresh, revision="v2")
    hub.repos["me/plain"] = plain = Repo()
    plain.commit(peft_files(tmp_path / "plain"))
    with pytest.raises(Corrupt, match="was not pushed by qhub"):
        pull(fresh, "me/plain", endpoint=hub.endpoint)
    assert is_untouched(fresh)

    result = pulled(hub, fresh, revision="v1")

    assert result.version.content_digest == version.content_digest
    assert verify_signature(fresh, result.version, [keys["team"][1]]) == keys["team"][1]


def test_forged_signature_is_refused(hub: HubServer, registry: Registry, home: Home, keys) -> None:
    """Whatever stands in place of the signature is one sentence, and nothing is registered."""
    sign(registry, publish(registry), keys["team"][0])
    pushed(hub, registry)
    good = json.loads(hub.repos[REPO].files()[SIGNATURE])
    shutil.rmtree(home.root)
    empty = {**good, "dsseEnvelope": {**good["dsseEnvelope"], "signatures": []}}
    for forged in (b"", b"{}", b"[" * 50_000, b"\xff", json.dumps(empty).encode()):
        hub.repos[REPO].commit({SIGNATURE: forged})
        with pytest.raises(Corrupt, match="does not hold"):
            pulled(hub, Registry(home), trusted=[keys["team"][1]])
    assert is_untouched(Registry(home))
    assert MANIFEST in hub.repos[REPO].files()


def test_command_line_signs_and_verifies(registry: Registry, keys, tmp_path: Path) -> None:
    """`qhub sign` and `qhub verify --key` work together; wrong keys are reported with how to make right ones."""
    publish(registry)
    publish(registry, seed=1)
    private, public = (str(path) for path in keys["team"])

    signed = CliRunner().invoke(sign_command, ["sentiment@1", "--key", private], catch_exceptions=False)
    verified = CliRunner().invoke(verify_command, ["sentiment@1", "--key", public], catch_exceptions=False)

    assert "sentiment@1 signed" in signed.output
    assert "1 version verified, signed with team.pub" in verified.output
    with pytest.raises(Corrupt, match="1 of 2 versions are not sound"):
        CliRunner().invoke(verify_command, ["--key", public], catch_exceptions=False, standalone_mode=False)
    (tmp_path / "text.pem").write_text("no key")
    for wrong, reason in ((public, "cannot be used to sign"), (str(tmp_path / "text.pem"), "cannot be used"),
                          (str(tmp_path / "none"), "there is no key")):  # fmt: skip
        with pytest.raises(QhubError, match=reason) as caught:
            CliRunner().invoke(
                sign_command, ["sentiment@1", "--key", wrong], catch_exceptions=False, standalone_mode=False
            )
        assert "openssl ecparam" in str(caught.value)


def test_key_with_a_password(registry: Registry, tmp_path: Path) -> None:
    """A key that openssl encrypted signs with its password and says so without."""
    subprocess.run(
        ["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-aes256", "-pass",
         "pass:secret", "-out", str(tmp_path / "locked.pem")],
        check=True, capture_output=True,
    )  # fmt: skip
    version = publish(registry)

    with pytest.raises(InputError, match=r"[Pp]assword"):
        sign(registry, version, tmp_path / "locked.pem")
    sign(registry, version, tmp_path / "locked.pem", password="secret")
    assert signature_of(registry, version)


def test_trusted_keys_must_be_files(monkeypatch, tmp_path: Path) -> None:
    """A policy that names a missing key is an error, not no policy."""
    monkeypatch.setenv("QHUB_TRUSTED_KEYS", f"{tmp_path}/absent.pub")
    with pytest.raises(InputError, match=r"QHUB_TRUSTED_KEYS names .*absent.pub, which is not a file"):
        trusted_keys()
    monkeypatch.setenv("QHUB_TRUSTED_KEYS", "")
    assert trusted_keys() == ()
