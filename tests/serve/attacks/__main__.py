"""How long others wait while a server is attacked: for each attack that is felt, and at most.

python -m tests.serve.attacks                       # the attacks of CI
python -m tests.serve.attacks large                 # 4 MB of every kind at every place: 1,357 requests, ten minutes
python -m tests.serve.attacks large /v1/messages    # the same at one endpoint
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.serve.attacks.attacked import AttackedServer, Bystander, look
from tests.serve.attacks.bodies import BODIES, CHAT, USER, Attack
from tests.serve.attacks.conftest import make_home
from tests.serve.attacks.forms import FORMS
from tests.serve.attacks.large import large_bodies

FELT = 0.1  # seconds: waits below are not listed


def attacks(words: list[str]) -> Iterator[tuple[str, Attack]]:
    """The attacks that are asked for, by their names."""
    if words:
        yield from ((name, one) for name, one in large_bodies() if words[1:] in ([], [one.path]))
        return
    yield from BODIES.items()
    for name, (change, status, _, said) in FORMS.items():
        body = {"model": "alpha", "messages": [USER], "max_tokens": 4, **change}
        yield name, Attack(CHAT, status, said, body)


def main(words: list[str]) -> int:
    """Attack a server, and print who waited how long; 1 if an answer was a 5xx or the server ended."""
    broken = []
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        server = AttackedServer(make_home(Path(folder)))
        try:
            with Bystander(server, look) as others:
                for name, attack in attacks(words):
                    content, headers = attack.content, attack.all_headers
                    others.waits.clear()
                    start = time.monotonic()
                    answer = server.http.request(attack.method, attack.path, content=content, headers=headers)
                    took = time.monotonic() - start
                    time.sleep(0.05)  # whoever still waits is counted here
                    wait = server.longest[name] = max(others.waits, default=0.0)
                    line = f"{wait:6.2f} s  {took:6.2f} s  {answer.status_code}  {name}  {answer.text[:80]}\n"
                    if answer.status_code >= 500 or not server.is_alive:
                        broken.append(line)
                    if wait > FELT:
                        sys.stdout.write(line)
                        sys.stdout.flush()
            broken += others.failures
        finally:
            code = server.stop()
    sys.stdout.write("".join(f"broken: {line}\n" for line in broken))
    seconds = time.monotonic() - begin
    sys.stdout.write(f"{server.told()}; {len(broken)} failures, exit code {code}, {seconds:.0f} s\n")
    return 1 if broken or code else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
