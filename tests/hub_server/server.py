"""HubServer: the server, what it holds, what it was asked, and what is to go wrong."""

from collections.abc import Callable
from http.server import ThreadingHTTPServer
from threading import RLock, Thread

from tests.hub_server import files, history, repositories, uploads
from tests.hub_server.handler import Handler, Request
from tests.hub_server.repo import Repo


class HubServer:
    """The server and all it knows; `requests` are those it answered, in order."""

    def __init__(self, *, multipart_above: int = 5 << 20) -> None:
        self.token = "hf_test"
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[Request] = []
        self.routes = [*repositories.ROUTES, *uploads.ROUTES, *history.ROUTES, *files.ROUTES]
        self.before: Callable[[str, str], bool | None] | None = None
        self.disturbances: list[list] = []
        self.may_create = self.may_write = True
        self.requests_left: int | None = None
        self.window, self.reset = 20, 0  # requests, and seconds that are asked for
        self.renamed: dict[str, str] = {}
        self.large_files_elsewhere = False
        self.multipart_above = multipart_above
        self.lock = RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfThisHub", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self) -> "HubServer":
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def calls(self, method: str = "", part: str = "") -> list[Request]:
        """The requests with this method, whose path has `part` in it."""
        return [request for request in self.requests if request.method.startswith(method) and part in request.path]

    def disturb(self, part: str, kind: str | int, times: int = 1) -> None:
        """Spoil the next answers to paths with `part` in them.

        `kind` is a status that is answered instead, "drop" (the connection breaks before the work), "lose" (after
        the work), "cut" (in the middle of the answer), "slow" (the answer comes in pieces) or "flip" (a bit is wrong).
        """
        self.disturbances.append([part, kind, times])

    def disturbance(self, path: str) -> str | int | None:
        """What is to go wrong with this request."""
        for entry in self.disturbances:
            if entry[0] in path and entry[2] > 0:
                entry[2] -= 1
                return entry[1]
        return None

    @property
    def lfs_bytes(self) -> int:
        """How many bytes of large files were sent."""
        return sum(len(request.body) for request in self.calls("PUT"))
