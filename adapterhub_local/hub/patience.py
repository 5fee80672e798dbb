"""A client of the Hub that waits where it is asked to: for 429 as long as the Hub says, for 5xx a little."""

import re
import time
from collections.abc import Callable
from functools import wraps
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

Note = Callable[[str], None]  # called before a wait that a person would wonder about
MAX_WAIT = 900  # seconds of one call for 429 in all; the Hub counts requests in windows of five minutes
NOTICED = 3  # seconds of a wait that is worth a line
PAUSES = (0.5, 2.0, 4.0)  # seconds before a 5xx is asked again
UNSAID = 30  # seconds where the Hub does not say how long
_RATE_LIMIT = re.compile(r"\bt\s*=\s*(\d{1,6})\b")  # `"api";r=0;t=55`: draft-ietf-httpapi-ratelimit-headers

# A commit whose answer was a 5xx may be there, so it is not simply asked again: `repository.commit` looks first.
_ONCE = frozenset(("create_commit",))
_CALLS = (
    *("create_repo", "delete_repo", "repo_exists", "model_info", "list_repo_refs", "get_paths_info", "create_commit"),
    *("create_tag", "create_branch", "delete_branch", "hf_hub_download"),
)


class PatientApi(HfApi):
    """HfApi whose calls wait and ask again; `note` gets a line about long waits."""

    note: Note | None = None


def seconds_asked(error: BaseException) -> float | None:
    """How long the Hub asks to wait, if it refused for too many requests."""
    response = error.response if isinstance(error, HfHubHTTPError) else None
    if response is None or response.status_code != 429:
        return None
    after = response.headers.get("Retry-After", "").strip()
    if after.isdigit() and len(after) < 7:
        return float(after)
    limit = _RATE_LIMIT.search(response.headers.get("RateLimit", ""))
    return float(limit[1]) if limit else UNSAID


def _patient(name: str) -> Callable[..., Any]:
    call = getattr(HfApi, name)

    @wraps(call)
    def ask(self: PatientApi, *arguments: Any, **options: Any) -> Any:
        waited, pauses = 0.0, list(() if name in _ONCE else PAUSES)
        while True:
            try:
                return call(self, *arguments, **options)
            except Exception as error:
                refused = error.__cause__ if not isinstance(error, HfHubHTTPError) and error.__cause__ else error
                asked = seconds_asked(refused)
                status = refused.response.status_code if isinstance(refused, HfHubHTTPError) else 0
                if asked is not None and waited + asked <= MAX_WAIT:
                    waited += (pause := max(asked, 0.2))
                    if self.note is not None and pause >= NOTICED:
                        self.note(f"the Hub asks to wait {pause:.0f} s (too many requests)")
                elif status >= 500 and pauses:
                    pause = pauses.pop(0)
                else:
                    raise
            time.sleep(pause)

    return ask


for _name in _CALLS:
    setattr(PatientApi, _name, _patient(_name))
