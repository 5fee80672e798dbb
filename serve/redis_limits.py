"""Limits that all servers with one Redis share: each question is one script, which Redis runs alone and by its clock.

`qhub:{<id of a key>}:running|asked|refused`     sorted sets of leases by when they end, or when they were counted

A lease is renewed while its request runs, so that one whose server was killed ends soon. If Redis does not answer, a
key with limits is refused and one without is let in: nobody gets more than their limit because a counter is away.
"""

import asyncio
import logging
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, parse_qs, urlsplit

from adapterhub_local.errors import InputError
from adapterhub_local.settings import redis_password
from serve.errors import LimitsAway
from serve.limits import CONCURRENCY_WAIT, Bounds, Lease, Refusal, Why

if TYPE_CHECKING:
    from redis.asyncio import Redis

logger = logging.getLogger(__name__)
SCHEMES = ("redis", "rediss", "unix")
LEASE_SECONDS = 30.0  # after which a request that nobody renews runs no more
WAIT_SECONDS = 2.0  # for Redis to answer
# KEYS: running, asked, refused; ARGV: lease, its seconds, concurrency, requests, seconds (0: no such bound). Asked
# again after an answer that was lost, it has the same to say
ADMIT = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local lease, lasts, concurrency = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local requests, seconds = tonumber(ARGV[4]), tonumber(ARGV[5])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
if redis.call('ZSCORE', KEYS[1], lease) or redis.call('ZSCORE', KEYS[2], lease) then return {'', '0'} end
if concurrency > 0 and redis.call('ZCARD', KEYS[1]) >= concurrency then return {'concurrency', '0'} end
if requests > 0 then
  for index, why in ipairs({'rate', 'refusals'}) do
    local times = KEYS[index + 1]
    redis.call('ZREMRANGEBYSCORE', times, '-inf', now - seconds)
    if redis.call('ZCARD', times) >= requests then
      local oldest = redis.call('ZRANGE', times, 0, 0, 'WITHSCORES')[2]
      return {why, tostring(oldest + seconds - now)}
    end
  end
  redis.call('ZADD', KEYS[2], now, lease)
  redis.call('EXPIRE', KEYS[2], seconds)
end
if concurrency > 0 then
  redis.call('ZADD', KEYS[1], now + lasts, lease)
  redis.call('EXPIRE', KEYS[1], math.ceil(lasts) + 1)
end
return {'', '0'}
"""
# KEYS as above; ARGV: lease, seconds, whether it ran
RELEASE = """
redis.call('ZREM', KEYS[1], ARGV[1])
if ARGV[3] == '0' and redis.call('ZREM', KEYS[2], ARGV[1]) == 1 then
  local time = redis.call('TIME')
  redis.call('ZADD', KEYS[3], time[1] + time[2] / 1000000, ARGV[1])
  redis.call('EXPIRE', KEYS[3], ARGV[2])
end
"""
# KEYS: running; ARGV: its seconds, then leases. One that was taken for lost meanwhile counts again
RENEW = """
local time = redis.call('TIME')
for index = 2, #ARGV do
  redis.call('ZADD', KEYS[1], time[1] + time[2] / 1000000 + ARGV[1], ARGV[index])
end
redis.call('EXPIRE', KEYS[1], math.ceil(ARGV[1]) + 1)
"""


class RedisLimits:
    """The limits of all servers with the Redis at `url`; see Limits. Redis is first asked when a key with limits comes.

    A password is taken from the environment (`settings.redis_password`) unless the URL has one. Raises InputError.
    """

    def __init__(self, url: str, *, lease_seconds: float = LEASE_SECONDS) -> None:
        self.place = shown(url)
        self.lease_seconds = lease_seconds
        self._client = _client(url)
        self._admit, self._release, self._renew = map(self._client.register_script, (ADMIT, RELEASE, RENEW))
        self._held: dict[str, set[str]] = {}  # key -> leases of this server that bound how much runs at once
        self._renewing: asyncio.Task[None] | None = None
        self._is_away = False

    async def admit(self, key: str, bounds: Bounds) -> Lease | Refusal:
        """See Limits."""
        lease = Lease(key, bounds.seconds)
        limits = [bounds.concurrency or 0, bounds.requests or 0, bounds.seconds or 0]
        reply = await self._ask(self._admit, _names(key), [lease.id, self.lease_seconds, *limits])
        why: Why | None = reply[0].decode() or None
        if why is not None:
            return Refusal(why, CONCURRENCY_WAIT if why == "concurrency" else float(reply[1]))
        if bounds.concurrency is not None:
            self._held.setdefault(key, set()).add(lease.id)
            if self._renewing is None or self._renewing.done():
                self._renewing = asyncio.create_task(self._keep_renewing())
        return lease

    async def release(self, lease: Lease, *, ran: bool) -> None:
        """See Limits. If Redis does not hear of it, the lease ends by itself."""
        held = self._held.get(lease.key, set())
        held.discard(lease.id)
        if not held:
            self._held.pop(lease.key, None)
        try:
            await self._ask(self._release, _names(lease.key), [lease.id, lease.seconds or 0, int(ran)])
        except LimitsAway:
            return  # logged already

    async def close(self) -> None:
        """See Limits."""
        if self._renewing is not None:
            self._renewing.cancel()
        await self._client.aclose()

    async def _keep_renewing(self) -> None:
        while self._held:
            await asyncio.sleep(self.lease_seconds / 3)
            for key, leases in list(self._held.items()):
                try:
                    await self._ask(self._renew, _names(key)[:1], [self.lease_seconds, *leases])
                except LimitsAway:
                    break

    async def _ask(self, script: Any, keys: list[str], values: list[Any]) -> Any:
        """What a script answers. Raises LimitsAway, which is logged once until Redis answers again."""
        from redis.exceptions import RedisError

        try:
            answer = await script(keys, values)
        except (RedisError, OSError, TimeoutError) as error:
            reason = f"{type(error).__name__}: {error}"
            if not self._is_away:
                logger.error("limits at %s cannot be reached, keys with limits are refused: %s", self.place, reason)
            self._is_away = True
            raise LimitsAway(
                "the limits of this key cannot be checked right now, so it is not let in: try again soon"
            ) from None
        if self._is_away:
            logger.warning("limits at %s answer again", self.place)
        self._is_away = False
        return answer


def _names(key: str) -> list[str]:
    """The sets of a key; the braces keep them on one node of a cluster, as a script wants it."""
    return [f"qhub:{{{key}}}:{what}" for what in ("running", "asked", "refused")]


def shown(url: str) -> str:
    """A URL without what is secret in it; of one that cannot be read, and may hold a password anywhere, the scheme."""
    parts = _parts(url)
    if parts is not None:
        return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()
    if re.fullmatch(r"([a-z]+://)?[\w.-]*(:[0-9]*)?(/\w*)*", url):
        return url
    scheme = re.match(r"[a-z]{1,8}://", url)
    return f"{scheme[0] if scheme else ''}..."


def has_password(url: str) -> bool:
    """Whether the URL of a Redis holds a password, before the host or among its options."""
    parts = _parts(url)
    return parts is not None and bool(parts.password or parse_qs(parts.query).get("password"))


def _parts(url: str) -> SplitResult | None:
    """The parts of the URL of a Redis, None if it is not one."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises ValueError, which would quote what is there
    except ValueError:
        return None
    is_path = parts.scheme == "unix" or re.fullmatch(r"(/[0-9]*)?", parts.path)
    is_cut = "@" in parts.path + parts.query or parts.fragment  # by a `/`, `?` or `#` of a password
    return parts if parts.scheme in SCHEMES and is_path and not is_cut else None


def _client(url: str) -> "Redis":
    parts = _parts(url)
    if parts is None:
        raise InputError(
            f"'{shown(url)}' is not a Redis URL: write redis://HOST:6379/0, rediss:// or unix://PATH, and the password "
            "in QHUB_REDIS_PASSWORD, or percent-encoded"
        )
    try:
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
    except ImportError:
        raise InputError("limits in Redis need its client: pip install 'adapterhub-local[redis]'") from None
    try:
        # once more, for a connection that lay idle until Redis closed it
        again = Retry(NoBackoff(), 1)
        return Redis.from_url(
            url, password=redis_password(),  # a password in the URL goes before it
            retry=again, socket_timeout=WAIT_SECONDS, socket_connect_timeout=WAIT_SECONDS,
        )  # fmt: skip
    except ValueError as error:
        raise InputError(f"'{shown(url)}' is not a Redis URL: {error}") from None
