"""How large a page may be: what does not fit is made again with less of everything, until it does.

Pages name what they leave out and where it is. A registry may hold anything; a browser should not have to.
"""

import re
from collections.abc import Callable

from fastapi.responses import Response

BYTES, NODES = 60_000, 1_500
SHARES = (1.0, 0.8, 0.6, 0.4, 0.2, 0.05)  # of what a page shows at most
_ELEMENT = re.compile(rb"<[a-z]")  # texts are escaped, so only markup has it


def size_of(page: bytes) -> tuple[int, int]:
    """Bytes and elements of a page."""
    return len(page), len(_ELEMENT.findall(page))


def fitted(make: Callable[[float], Response]) -> Response:
    """The page with the largest share of its contents that is small enough, else with the smallest share."""
    for share in SHARES:
        response = make(share)
        size, nodes = size_of(bytes(response.body))
        if size <= BYTES and nodes <= NODES:
            break
    return response


def part(most: int, share: float) -> int:
    """A share of a number, at least 1."""
    return max(1, int(most * share))
