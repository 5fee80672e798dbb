"""Credentials of registries, from where `docker login` and `oras login` write them."""

import base64
import binascii
import json
from typing import Any

from adapterhub_local import settings
from adapterhub_local.errors import InputError


def credentials(host: str) -> tuple[str, str] | None:
    """User and password for a registry, None if there are none. Raises InputError for what cannot be read."""
    path = settings.docker_config()
    try:
        known: Any = json.loads(path.read_bytes())
        entry = (known.get("auths") or {}).get(host) or (known.get("auths") or {}).get(f"https://{host}")
        helper = (known.get("credHelpers") or {}).get(host) or known.get("credsStore")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if entry and entry.get("auth"):
        try:
            user, colon, password = base64.b64decode(entry["auth"], validate=True).decode().partition(":")
        except (binascii.Error, ValueError, TypeError):
            raise InputError(f"{path} holds credentials of {host} that cannot be read: log in again") from None
        return (user, password) if colon else None
    if helper:
        raise InputError(
            f"{path} keeps the credentials of {host} with the helper '{helper}', which is not asked here: write them "
            "there by `oras login` or `docker login` without a helper"
        )
    return None
