"""Object stores: bounded waits for their clients, and a sentence for each way in which S3 refuses."""

from collections.abc import Mapping
from typing import Any

from adapterhub_local.errors import NotFound, QhubError, RemoteError

S3 = ("s3", "s3a")
CONNECT, READ, TRIES = 3, 3, 3  # seconds without a byte, and how often: a server that is not there is known in ten
KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile in AWS_PROFILE"
_REGION = "its bucket is in another region than was asked: name it in AWS_DEFAULT_REGION"
_REASONS = {
    "InvalidAccessKeyId": f"the access key is not known there: check {KEYS}",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key: check AWS_SECRET_ACCESS_KEY",
    "RequestTimeTooSkewed": "the clock of this machine is wrong: set it",
    "NoSuchBucket": "there is no such bucket: create it first",
    **dict.fromkeys(
        ("ExpiredToken", "InvalidToken", "TokenRefreshRequired"), "the session's token has expired: log in again"
    ),
    **dict.fromkeys(
        ("AccessDenied", "AllAccessDisabled", "AccountProblem", "403", "Forbidden"),
        "these keys are not allowed to do this: they need s3:ListBucket, s3:GetObject and s3:PutObject there",
    ),
    **dict.fromkeys(
        ("PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed", "301", "RecursionError",
         "IllegalLocationConstraintException"), _REGION,
    ),
    **dict.fromkeys(("NoCredentialsError", "PartialCredentialsError"), f"there are no keys for it: set {KEYS}"),
    **dict.fromkeys(("SlowDown", "ServiceUnavailable", "InternalError", "503", "500"), "it is busy: try again later"),
}  # fmt: skip
_SILENT = ("Timeout", "Connect", "ConnectionClosed", "Endpoint", "HTTPClientError", "ServerDisconnected", "DNS")


def with_bounds(scheme: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a store's client, with waits that end; what the user's own say stays.

    Raises ImportError where there is no client.
    """
    if scheme not in S3:
        return dict(options)
    from aiobotocore.session import AioSession
    from botocore.handlers import add_expect_header

    session = AioSession(profile=options.get("profile"))
    # "may I send it?" is waited for without a bound, and small objects are sent at once anyway
    session.unregister("before-call.s3", add_expect_header)
    config = {"connect_timeout": CONNECT, "read_timeout": READ, "retries": {"total_max_attempts": 1}}
    return {"session": session, **options, "config_kwargs": {**config, **dict(options.get("config_kwargs") or {})}}


def bounded(scheme: str, fs: Any) -> Any:
    """A store's filesystem that asks again a few times, not for minutes."""
    if scheme in S3:
        fs.retries = TRIES
    return fs


def code_of(error: BaseException) -> str:
    """How S3 names what went wrong, or else the kind of the innermost error."""
    names: list[str] = []
    link: BaseException | None = error
    while link is not None and len(names) < 20:
        response = getattr(link, "response", None)
        if isinstance(response, Mapping) and (code := (response.get("Error") or {}).get("Code")):
            return str(code)
        names.append(type(link).__name__)
        link = link.__cause__ or link.__context__
    known = [name for name in names if name in _REASONS]
    inner = [name for name in names if name not in ("OSError", "PermissionError", "RemoteError")]
    return (known or inner or names)[0]


def refused(url: str, error: BaseException, again: Any = None) -> QhubError:
    """The error in our words. `again` asks in a way that names the reason: an answer to HEAD has no body for it."""
    code = code_of(error)
    if code in ("403", "Forbidden", "PermissionError") and again is not None:
        try:
            again()
        except Exception as raised:
            code = code_of(raised)
    if reason := _REASONS.get(code):
        kind = NotFound if code == "NoSuchBucket" else RemoteError
        return kind(f"{url}: {reason} ({code})")
    if any(part in code for part in _SILENT):
        return RemoteError(f"{url} did not answer ({code}): check the network, and endpoint_url if it has one")
    reason = " ".join(str(error).split())[:300] or "no reason given"
    return RemoteError(f"{url} refused or did not answer: {type(error).__name__}: {reason}")
