"""Provenance that others check: in-toto statement, DSSE signature, bill of materials, and the chain link by link."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from adapterhub_local.cli.main import qhub
from adapterhub_local.durable import digest_bytes
from adapterhub_local.errors import Corrupt, InputError, NotFound
from adapterhub_local.registry import Registry, Version
from adapterhub_local.registry.attest import PAYLOAD_TYPE, encoding, payload_of, statement
from adapterhub_local.registry.chain import chain
from adapterhub_local.registry.envelope import attest, envelope_of, need_attestation, verify_envelope
from adapterhub_local.registry.ml_bom import ml_bom
from adapterhub_local.registry.signature import sign
from tests.registry.test_signature import make_keys
from tests.stores import LINEAGE, files

pytest.importorskip("cryptography", reason="the extra `sign` is not installed")

RECIPE, DATA = "[base]\nname = 'tiny'\n", b'{"text": "a"}\n'


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """`tone@1`, and `sentiment@1` trained on from it with a recipe, data and an environment."""
    made = Registry(tmp_path / "home")
    tone = made.publish("tone", files(5), LINEAGE)
    made.publish("sentiment", files(1), {
        **LINEAGE, "task": "sentiment", "seed": 7, "run": "run-1",
        "recipe": {"text": RECIPE, "digest": digest_bytes(RECIPE.encode()), "overrides": ["train.seed=7"]},
        "data": [{"role": "train", "file": "data/train.jsonl", "rows": 1, "digest": digest_bytes(DATA)}],
        "parents": [{"reference": "tone@1", "manifest_digest": tone.manifest_digest, "weight": 1.0}],
        "environment": {"python": "3.11.7", "device": "cpu", "torch": "2.13.0+cpu", "adapterhub-local": "0.2.0"},
        "metrics": {"sentiment": {"adapter": {"exact_match": 0.9}}},
    })  # fmt: skip
    return made


@pytest.fixture
def version(registry: Registry) -> Version:
    return registry.resolve("sentiment@1")


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, tuple[Path, Path]]:
    return {name: make_keys(tmp_path, name) for name in ("team", "stranger")}


def test_the_statement_names_all_that_went_in(version: Version) -> None:
    """Every file is a subject; recipe, data, base, parent and packages are dependencies with what identifies them."""
    said = statement(version)
    assert {one["name"]: one["digest"]["sha256"] for one in said["subject"]} == {
        "sentiment@1": version.manifest_digest[7:], **{file.path: file.digest[7:] for file in version.files},
    }  # fmt: skip
    definition = said["predicate"]["buildDefinition"]
    assert definition["externalParameters"]["recipe"] == {"text": RECIPE, "overrides": ["train.seed=7"]}
    found = {one["name"]: one.get("digest") or one["uri"] for one in definition["resolvedDependencies"]}
    assert found == {
        "recipe": {"sha256": digest_bytes(RECIPE.encode())[7:]},
        "data data/train.jsonl": {"sha256": digest_bytes(DATA)[7:]},
        "base tiny": {"qhubBaseV1": "0" * 64},
        "parent tone@1": {"sha256": version.lineage["parents"][0]["manifest_digest"][7:]},
        "package torch": "pkg:pypi/torch@2.13.0%2Bcpu",
    }
    assert said["predicate"]["runDetails"]["builder"]["version"] == {"adapterhub-local": "0.2.0", "python": "3.11.7"}


def test_it_is_valid_by_the_schemas_of_in_toto(version: Version) -> None:
    """in-toto's own library reads statement and provenance strictly, every field known, and finds them valid."""
    pytest.importorskip("in_toto_attestation", reason="in-toto's library is not installed")
    from google.protobuf import json_format
    from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
    from in_toto_attestation.v1 import statement_pb2
    from in_toto_attestation.v1.statement import Statement

    said = json.loads(payload_of(version))
    Statement.copy_from_pb(json_format.ParseDict(said, statement_pb2.Statement())).validate()
    read = json_format.ParseDict(said["predicate"], provenance_pb2.Provenance())
    assert read.run_details.builder.id == "urn:adapterhub-local:qhub"
    assert len(read.build_definition.resolved_dependencies) == 5


def test_another_library_verifies_the_envelope(registry: Registry, version: Version, keys: Any) -> None:
    """securesystemslib, which in-toto and sigstore's tools use, accepts the signature with our public key only."""
    pytest.importorskip("securesystemslib", reason="securesystemslib is not installed")
    from cryptography.hazmat.primitives import serialization
    from securesystemslib.dsse import Envelope
    from securesystemslib.exceptions import VerificationError
    from securesystemslib.signer import SSlibKey

    envelope = Envelope.from_dict(json.loads(attest(registry, version, keys["team"][0])))
    assert envelope.payload_type == PAYLOAD_TYPE
    for name, holds in (("team", True), ("stranger", False)):
        key = SSlibKey.from_crypto(serialization.load_pem_public_key(keys[name][1].read_bytes()))
        key.keyid = next(iter(envelope.signatures))
        if holds:
            assert len(envelope.verify([key], 1)) == 1
        else:
            with pytest.raises(VerificationError):
                envelope.verify([key], 1)


def test_an_envelope_holds_for_its_key_and_its_bytes(registry: Registry, version: Version, keys: Any) -> None:
    """It says which key it was; another key, another payload, another type and rubbish are refused."""
    with pytest.raises(NotFound, match="sentiment@1 has no attestation: `qhub attest sentiment@1"):
        need_attestation(registry, version)
    attest(registry, version, keys["team"][0])
    envelope = need_attestation(registry, version)
    said, key = verify_envelope(envelope, [keys["stranger"][1], keys["team"][1]])
    assert (said, key) == (statement(version), keys["team"][1])
    with pytest.raises(Corrupt, match=r"was not signed with stranger\.pub"):
        verify_envelope(envelope, [keys["stranger"][1]])
    fields = json.loads(envelope)
    other = json.loads(base64.b64decode(fields["payload"]))
    other["predicate"]["buildDefinition"]["internalParameters"]["seed"] = 8
    forged = base64.b64encode(json.dumps(other).encode()).decode()
    for change in ({"payload": forged}, {"payloadType": "text/plain"}, {"signatures": []}, {"payload": "e30="}):
        with pytest.raises(Corrupt):
            verify_envelope(json.dumps({**fields, **change}).encode(), [keys["team"][1]])
    for rubbish in (b"", b"[]", b"{}", b"[" * 100_000):
        with pytest.raises(Corrupt, match="not a DSSE envelope"):
            verify_envelope(rubbish, [keys["team"][1]])


def test_what_is_signed_has_dsses_form() -> None:
    """The example of DSSE's protocol, by hand."""
    assert encoding(b"hello world") == b"DSSEv1 28 application/vnd.in-toto+json 11 hello world"


def test_a_key_that_cannot_sign_is_refused(registry: Registry, version: Version, tmp_path: Path) -> None:
    """With its name and how to make one; nothing is kept."""
    (tmp_path / "bad.pem").write_text("no key")
    with pytest.raises(InputError, match=r"bad\.pem cannot be used to sign.*openssl"):
        attest(registry, version, tmp_path / "bad.pem")
    with pytest.raises(NotFound, match="there is no key"):
        attest(registry, version, tmp_path / "none.pem")
    assert envelope_of(registry, version) is None


def states(
    registry: Registry, version: Version, keys: tuple[Path, ...] = (), data: Path | None = None
) -> dict[str, str]:
    """Link -> state, of the version itself."""
    return {link.about: link.state for link in chain(registry, version, keys, data) if link.version == str(version)}


def test_each_link_of_the_chain_is_explained(registry: Registry, version: Version, keys: Any, tmp_path: Path) -> None:
    """Open until it is signed, recorded until it can be checked, holding when it was, broken when it does not."""
    assert states(registry, version) == {
        "bytes": "holds", "signature": "open", "attestation": "open", "recipe": "holds", "data": "recorded",
        "base": "recorded", "parent": "holds",
    }  # fmt: skip
    sign(registry, version, keys["team"][0])
    attest(registry, version, keys["team"][0])
    (tmp_path / "train.jsonl").write_bytes(DATA)
    known = states(registry, version, (keys["team"][1],), tmp_path)
    assert {about for about, state in known.items() if state != "holds"} == {"base"}
    (tmp_path / "train.jsonl").write_bytes(b"other")
    changed = states(registry, version, (keys["stranger"][1],), tmp_path)
    assert {about for about, state in changed.items() if state == "broken"} == {"signature", "attestation", "data"}
    assert {link.version for link in chain(registry, version)} == {"sentiment@1", "tone@1"}


def test_an_attestation_put_beside_another_version_does_not_hold(
    registry: Registry, version: Version, keys: Any
) -> None:
    """A good signature of one version says nothing of another."""
    attest(registry, version, keys["team"][0])
    other = registry.publish("sentiment", files(2), LINEAGE)
    folder = registry.home.signatures
    kept = folder / f"{version.manifest_digest[7:]}.intoto.json"
    (folder / f"{other.manifest_digest[7:]}.intoto.json").write_bytes(kept.read_bytes())
    assert states(registry, other, (keys["team"][1],))["attestation"] == "broken"


def test_a_bill_of_materials_is_the_same_for_the_same_version(registry: Registry, version: Version) -> None:
    """Model, card, base, data, parent and packages, each once, and all references resolve."""
    bill = ml_bom(registry, version)
    assert bill == ml_bom(registry, version)
    parts = {part["bom-ref"]: part["type"] for part in bill["components"]}
    assert parts == {
        "base:tiny": "machine-learning-model", "data:train:data/train.jsonl": "data",
        "parent:tone@1": "machine-learning-model", "package:torch": "library",
    }  # fmt: skip
    card = bill["metadata"]["component"]["modelCard"]
    assert card["quantitativeAnalysis"]["performanceMetrics"] == [
        {"type": "exact_match", "value": "0.9", "slice": "sentiment"}
    ]
    assert card["modelParameters"]["datasets"] == [{"ref": "data:train:data/train.jsonl"}]
    assert set(bill["dependencies"][0]["dependsOn"]) == set(parts)


def test_the_verbs_write_and_explain(registry: Registry, version: Version, keys: Any, tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """`attest` writes what `verify --explain` reads; a broken link is exit code 1, bad usage 2."""
    monkeypatch.setenv("QHUB_HOME", str(registry.home.root))
    run, out = CliRunner().invoke, tmp_path / "out.json"
    assert run(qhub, ["attest", "sentiment", "--key", str(keys["team"][0]), "-o", str(out)]).exit_code == 0
    assert json.loads(out.read_text())["payloadType"] == PAYLOAD_TYPE
    done = run(qhub, ["verify", "sentiment", "--key", str(keys["team"][1]), "--explain", "--json"])
    assert {link["about"]: link["state"] for link in json.loads(done.output)}["attestation"] == "open"  # of tone
    refused = run(qhub, ["verify", "sentiment", "--key", str(keys["stranger"][1]), "--explain"])
    assert isinstance(refused.exception, Corrupt)
    bill = run(qhub, ["attest", "sentiment", "--ml-bom", "-o", "-"])
    assert json.loads(bill.output)["bomFormat"] == "CycloneDX"
    for words in (["attest", "sentiment"], ["attest", "sentiment", "--ml-bom", "--key", "x"], ["verify", "--explain"],
                  ["verify", "sentiment", "--data", "."]):  # fmt: skip
        assert isinstance(run(qhub, words).exception, InputError), words
