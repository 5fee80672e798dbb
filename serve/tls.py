"""Tls: the certificate by which a server proves its name, read from files, and again when they have changed."""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub_local.errors import InputError
from adapterhub_local.options import chosen, option


@dataclass(frozen=True)
class Tls:
    """PEM files: the certificate with those that vouch for it, its private key, and whose clients may connect."""

    certificate: Path = option(
        None,
        "Serve https with this certificate, followed by those that vouch for it. SIGHUP has it read again.",
        "--ssl-certfile",
        metavar="PEM",
    )
    key: Path | None = option(
        None, "Its private key.", "--ssl-keyfile", metavar="PEM", derived="it stands in the same file"
    )
    ca: Path | None = option(
        None,
        "Only let in clients that show a certificate which one of these vouches for.",
        "--ssl-ca-certs",
        metavar="PEM",
        derived="any client may connect",
    )

    @classmethod
    def given(cls, options: Mapping[str, Any]) -> "Tls | None":
        """What a command was given, None if that is nothing. Raises InputError without a certificate."""
        found = chosen(cls, options)
        if found and "certificate" not in found:
            raise InputError("--ssl-keyfile and --ssl-ca-certs are of https: give a certificate with --ssl-certfile")
        return cls(**found) if found else None

    def check(self) -> ssl.SSLContext:
        """What the files say. Raises InputError about one that cannot be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._load(context)
        if self.ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            try:
                context.load_verify_locations(self.ca)
            except (OSError, ssl.SSLError) as error:
                raise InputError(f"{self.ca} cannot be read as certificates: {_reason(error)}") from None
        return context

    @staticmethod
    def prepare(context: ssl.SSLContext) -> None:
        """Have every connection to a server begin anew: a resumed one would not show its certificate again."""
        context.options |= ssl.OP_NO_TICKET
        context.num_tickets = 0

    def refresh(self, context: ssl.SSLContext) -> None:
        """Have connections that begin from now on see the files as they are now; those that run go on.

        Raises InputError about files that cannot be used; the old certificate stays then.
        """
        # a context of its own: in the old one a certificate of another kind of key would stand beside the old one
        fresh = self.check()

        def change(connection: ssl.SSLSocket | ssl.SSLObject, _: str | None, __: ssl.SSLContext) -> None:
            connection.context = fresh

        context.sni_callback = change  # called for clients that name no server, too

    def uvicorn(self) -> dict[str, Any]:
        """How uvicorn names it."""
        found: dict[str, Any] = {"ssl_certfile": str(self.certificate)}
        if self.key is not None:
            found["ssl_keyfile"] = str(self.key)
        if self.ca is not None:
            found |= {"ssl_ca_certs": str(self.ca), "ssl_cert_reqs": ssl.CERT_REQUIRED}
        return found

    def _load(self, context: ssl.SSLContext) -> None:
        for path in (self.certificate, self.key):
            try:
                if path is not None:
                    path.read_bytes()
            except OSError as error:
                raise InputError(f"{path} cannot be read: {error.strerror}") from None
        try:
            context.load_cert_chain(self.certificate, self.key, _no_password)
        except ssl.SSLError as error:
            where = self.certificate if self.key is None else f"{self.certificate} with the key {self.key}"
            raise InputError(f"{where} cannot be used as a certificate: {_reason(error)}") from None


def _no_password() -> str:
    raise InputError(
        "the private key is encrypted, and nobody is there to give its password: decrypt it (openssl pkey)"
    )


def _reason(error: OSError) -> str:
    reasons = {
        "KEY_VALUES_MISMATCH": "the key is of another certificate",
        "NO_CERTIFICATE_ASSIGNED": "the key is of another certificate",
        "KEY_TYPE_MISMATCH": "the key is of another certificate",
        "NO_CERTIFICATE_OR_CRL_FOUND": "there is no certificate in it",
        "EE_KEY_TOO_SMALL": "its key is too short to be safe",
        "NO_START_LINE": "there is no PEM text in it",
        "PEM lib": "there is no PEM text in it, or no private key",
    }
    reason = getattr(error, "reason", None) or error.strerror or str(error)
    return next((text for known, text in reasons.items() if known in str(error)), reason)
