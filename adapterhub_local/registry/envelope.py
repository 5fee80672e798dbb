"""DSSE envelopes signed and verified with the key files that `qhub sign` takes; needs the extra `sign`.

ECDSA over P-256 with SHA-256, P-384 with SHA-384 or P-521 with SHA-512, as model-signing, cosign and securesystemslib
have it: `cosign verify-blob-attestation --key PUBLIC.pem --insecure-ignore-tlog` reads the same envelope.
"""

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapterhub_local.digests import hex_of
from adapterhub_local.durable import staging
from adapterhub_local.errors import Corrupt, InputError, NotFound
from adapterhub_local.registry.attest import PAYLOAD_TYPE, encoding, payload_of, read_statement
from adapterhub_local.registry.registry import Registry
from adapterhub_local.registry.signature import HOW, check_key_file
from adapterhub_local.registry.version import Version
from adapterhub_local.settings import make_folder

MAX_BYTES = 16 << 20


def attest(registry: Registry, version: Version, private_key: Path, *, password: str | None = None) -> bytes:
    """Sign where a version comes from; the envelope, which is kept beside the registry. One before it is replaced.

    Raises InputError for a key that cannot be used.
    """
    ec, serialization = _package()
    check_key_file(private_key)
    try:
        secret = password.encode() if password else None
        key = serialization.load_pem_private_key(private_key.read_bytes(), secret)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError("it is not an elliptic-curve key")
        signature = key.sign(encoding(payload := payload_of(version)), ec.ECDSA(_hash(key.curve.key_size)))
    except (ValueError, TypeError) as error:
        raise InputError(f"{private_key} cannot be used to sign: {error}. {HOW}") from None
    entry = {"keyid": _key_id(key.public_key()), "sig": base64.b64encode(signature).decode()}
    payload64 = base64.b64encode(payload).decode()
    envelope = json.dumps({"payload": payload64, "payloadType": PAYLOAD_TYPE, "signatures": [entry]}).encode()
    make_folder(registry.home.signatures)
    with staging(registry.home.tmp) as stage:
        (stage / "envelope").write_bytes(envelope)
        os.replace(stage / "envelope", _path(registry, version))
    return envelope


def envelope_of(registry: Registry, version: Version) -> bytes | None:
    """The kept envelope of a version, None if there is none."""
    path = _path(registry, version)
    return path.read_bytes() if path.is_file() and path.stat().st_size <= MAX_BYTES else None


def verify_envelope(envelope: bytes, keys: Sequence[Path]) -> tuple[dict[str, Any], Path]:
    """The statement that is in an envelope, and which of the public `keys` signed it. Raises Corrupt, InputError."""
    ec, serialization = _package()
    try:
        fields = json.loads(envelope)
        payload = base64.b64decode(fields["payload"], validate=True)
        signatures = [base64.b64decode(one["sig"], validate=True) for one in fields["signatures"]]
        if fields["payloadType"] != PAYLOAD_TYPE:
            raise ValueError(f"its payload is {fields['payloadType']!a}")
        content = read_statement(payload)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Corrupt(f"the attestation is not a DSSE envelope of provenance: {error}") from None
    for path in keys:
        check_key_file(path)
        try:
            key = serialization.load_pem_public_key(path.read_bytes())
            if not isinstance(key, ec.EllipticCurvePublicKey):
                raise ValueError("it is not an elliptic-curve key")
        except ValueError as error:
            raise InputError(f"{path} is not a public key: {error}. {HOW}") from None
        if any(_holds(key, signature, payload) for signature in signatures):
            return content, path
    names = ", ".join(path.name for path in keys)
    raise Corrupt(f"the attestation was not signed with {names or 'a key that is given'}")


def _holds(key: Any, signature: bytes, payload: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature

    ec, _ = _package()
    try:
        key.verify(signature, encoding(payload), ec.ECDSA(_hash(key.curve.key_size)))
    except InvalidSignature:
        return False
    return True


def _hash(bits: int) -> Any:
    from cryptography.hazmat.primitives import hashes

    kinds: dict[int, Any] = {256: hashes.SHA256, 384: hashes.SHA384, 521: hashes.SHA512}
    if bits not in kinds:
        raise ValueError(f"its curve has {bits} bits: use P-256, P-384 or P-521")
    return kinds[bits]()


def _key_id(key: Any) -> str:
    """The sha256 of the public key as PEM, as model-signing's bundles hint at it."""
    _, serialization = _package()
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()


def _path(registry: Registry, version: Version) -> Path:
    return registry.home.signatures / f"{hex_of(version.manifest_digest)}.intoto.json"


def _package() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise InputError(
            f"attestations need a package that is not installed ({error.name}): pip install 'adapterhub-local[sign]'"
        ) from None
    return ec, serialization


def need_attestation(registry: Registry, version: Version) -> bytes:
    """The kept envelope. Raises NotFound."""
    envelope = envelope_of(registry, version)
    if envelope is None:
        raise NotFound(f"{version} has no attestation: `qhub attest {version} --key PRIVATE.pem` makes one")
    return envelope
