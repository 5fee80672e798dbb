"""Signatures of versions in the format of OpenSSF Model Signing: a sigstore bundle over weights and config.

Keys are files (elliptic curve, PEM), nothing is asked of the network. A signature lies beside the registry, under the
content digest of what it signs, and travels with a push as `model.sig`. Needs the extra `sign`.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from adapterhub_local.digests import hex_of
from adapterhub_local.durable import staging
from adapterhub_local.errors import Corrupt, InputError, NotFound
from adapterhub_local.registry.registry import Registry
from adapterhub_local.registry.version import Version
from adapterhub_local.settings import Home, make_folder

SIGNATURE = "model.sig"
MAX_BYTES = 1 << 20


def sign(registry: Registry, version: Version, private_key: Path, *, password: str | None = None) -> Path:
    """Sign the files of a version, their bytes checked first; the signature's path. One before it is replaced.

    Raises InputError for a key that cannot be used, Corrupt for damaged files.
    """
    signing = _package().signing
    folder = registry.folder(version)
    check_key_file(private_key)
    with staging(registry.home.tmp) as stage:
        try:
            # typed as text there, but what loads the key wants bytes
            secret = password.encode() if password else None
            config = signing.Config().use_elliptic_key_signer(private_key=private_key, password=secret)
            config.sign(folder, stage / SIGNATURE)
        except (ValueError, TypeError) as error:
            raise InputError(f"{private_key} cannot be used to sign: {_first_line(error)}. {HOW}") from None
        return keep(registry.home, version.content_digest, (stage / SIGNATURE).read_bytes())


def keep(home: Home, content_digest: str, signature: bytes) -> Path:
    """Store the signature of some content, and return where."""
    make_folder(home.signatures)
    target = _path(home, content_digest)
    with staging(home.tmp) as stage:
        (stage / SIGNATURE).write_bytes(signature)
        os.replace(stage / SIGNATURE, target)
    return target


def signature_of(registry: Registry, version: Version) -> bytes | None:
    """The kept signature of a version's content."""
    path = _path(registry.home, version.content_digest)
    return path.read_bytes() if path.is_file() else None


def verify_signature(registry: Registry, version: Version, keys: Sequence[Path]) -> Path:
    """Which of the public `keys` the version was signed with. Raises NotFound without a signature, Corrupt if it is
    none of them or not of these bytes.
    """
    signature = signature_of(registry, version)
    if signature is None:
        raise NotFound(f"{version} is not signed: `qhub sign {version} --key PRIVATE.pem`")
    return check(registry.folder(version), signature, keys, str(version), registry.home.scratch)


def check(folder: Path, signature: bytes, keys: Sequence[Path], what: str, tmp: Path) -> Path:
    """Which of `keys` made `signature` over exactly the files in `folder`. Raises Corrupt if none did."""
    verifying = _package().verifying
    problems = []
    with staging(tmp) as stage:
        (stage / SIGNATURE).write_bytes(signature)
        for key in keys:
            check_key_file(key)
            try:
                config = verifying.Config().use_elliptic_key_verifier(public_key=key)
            except (ValueError, TypeError) as error:
                raise InputError(f"{key} is not a public key: {_first_line(error)}. {HOW}") from None
            try:
                config.verify(folder, stage / SIGNATURE)
            except Exception as error:  # whatever a forged bundle makes the package raise, it did not verify
                problems.append(f"{key.name}: {_first_line(error)}")
            else:
                return key
    raise Corrupt(f"the signature of {what} does not hold ({'; '.join(problems)[:300]})")


HOW = (
    "Make a pair with `openssl ecparam -name prime256v1 -genkey -noout -out PRIVATE.pem` and "
    "`openssl ec -in PRIVATE.pem -pubout -out PUBLIC.pem`"
)


def _path(home: Home, content_digest: str) -> Path:
    return home.signatures / f"{hex_of(content_digest)}.sig"


def check_key_file(key: Path) -> None:
    """Raise NotFound, with how to make one, if there is no such key."""
    if not key.is_file():
        raise NotFound(f"there is no key {key}. {HOW}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _package() -> ModuleType:
    try:
        import model_signing
        import model_signing.signing
        import model_signing.verifying
    except ImportError as error:
        raise InputError(
            f"signatures need a package that is not installed ({error.name}): pip install 'adapterhub-local[sign]'"
        ) from None
    return model_signing
