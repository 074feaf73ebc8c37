"""A vault that lies, seen from outside the agent: the caller, the log and the audit file get none of it.

The bystander has its value already and is served it all the while: one bad vault never blocks a warm caller.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.agents import Process
from tests.attacks.rig import LOUD, Bystander, Child, Meter, Target
from tests.fakes import vault as fake
from tests.fakes.vault import FakeVault, Handler, Lie, serving
from tests.site import until

_HIDDEN = "planted-in-an-error-of-the-vault"
_NEVER = "planted-and-never-to-be-served"
_MOST_MIB = 32.0
"""What a lie may make the agent take beyond what it had."""


class Always(deque[Lie]):
    """A lie for every request but those for health, which go on being answered truly. `told` counts them."""

    def __init__(self, lie: Lie) -> None:
        super().__init__([lie])
        self.told = 0
        self._lie = lie

    def popleft(self) -> Lie:
        return self._tell

    def _tell(self, handler: Handler) -> None:
        if handler.path.startswith("/v1/sys/health"):
            handler.send(handler.vault.health_status(), {"sealed": False})
        else:
            self.told += 1
            self._lie(handler)


@pytest.fixture(scope="module")
def vault() -> Iterator[FakeVault]:
    with tempfile.TemporaryDirectory(prefix="tw-") as directory:
        made = FakeVault(roles=dict.fromkeys(("bystander", "loud", "held"), ("tests/",)))
        with serving(made, socket_path=f"{directory}/vault.sock"):
            yield made


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[FakeVault]:
    """Where a redirect leads; it hears nothing."""
    with serving(FakeVault()) as other:
        yield other


@pytest.fixture(scope="module")
def lied_to(vault: FakeVault) -> Iterator[Meter]:
    """An agent whose bystander has its value before the lies begin."""
    with tempfile.TemporaryDirectory(prefix="tw-") as directory:
        target = Target(Path(directory), vault.address, login=False)
        vault.secrets = {f"tests/data/{name}": {"value": secret} for name, secret in target.secrets.items()}
        with target.agent() as agent:
            agent.wait_for_log("serving on")
            with Bystander(target) as bystander:
                until(lambda: (seen := bystander.seen()).asked > 0 and not seen.errors, "the bystander is served")
                yield Meter(target, agent, bystander)


@contextlib.contextmanager
def lying(vault: FakeVault, lie: Lie) -> Iterator[Always]:
    vault.lies = always = Always(lie)
    try:
        yield always
    finally:
        vault.lies = deque()


_LIES: dict[str, Lie] = {
    "redirect": lambda handler: fake.redirects(_TARGETS[0] + handler.path)(handler),
    "redirect to a socket": fake.redirects("unix:///run/other.sock"),
    "endless body": fake.endless(b"HTTP/1.1 200 OK\r\n\r\n", bytes(65536)),
    "endless headers": fake.endless(b"HTTP/1.1 200 OK\r\n", b"X-A: " + b"b" * 1000 + b"\r\n"),
    "body by drips": fake.DRIP,
    "giant body": fake.huge(200 << 20),
    "gzip bomb": fake.says(200, fake.gzip_bomb(200 << 20), content_encoding="gzip"),
    "deep nesting": fake.says(200, b"[" * 500_000),
    "no object": fake.says(200, [_NEVER]),
    "wrong types": fake.says(200, {"data": {"data": [_NEVER], "metadata": {"version": _NEVER}}}),
    "html": fake.says(200, b"<html>" + _NEVER.encode(), content_type="text/html"),
    "no json": fake.writes(b"HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\n" + _NEVER.encode()),
    "no http": fake.writes(_NEVER.encode() + b"\r\n\r\n"),
    "header line breaks": fake.writes(b"HTTP/1.1 200 OK\r\nX: " + _NEVER.encode() + b"\r\n\tfolded\r\n\r\n"),
    "error with a secret": fake.refuses(403, f"permission denied: token {_HIDDEN}"),
    "failure with a secret": fake.refuses(500, f"could not log in as root with password {_HIDDEN}"),
    "refused login with a secret": fake.refuses(400, f"error validating token: {_HIDDEN}"),
    "wait for ever": fake.refuses(429, _HIDDEN, retry_after="9" * 30),
    "hangs": fake.hangs,
    "resets": fake.resets,
}
_TARGETS: list[str] = []


@pytest.mark.parametrize("what", list(_LIES))
def test_a_lie_reaches_nobody(vault: FakeVault, elsewhere: FakeVault, lied_to: Meter, what: str) -> None:
    _TARGETS[:] = [elsewhere.address]
    agent: Process = lied_to.agent
    said: list[Any] = []
    with lied_to.attacked(f"vault: {what}") as cost, lying(vault, _LIES[what]) as lies:
        with Child("tests.attacks.caller", LOUD, lied_to.target.socket) as loud:

            def lied() -> bool:  # until then the agent is still cautious because of the lie before
                said.append(loud.does("grpc", name="own", metadata=[]))
                return lies.told > 0

            until(lied, "the agent asked the vault")
        cost.got = sum(text in str(said) for text in (_NEVER, _HIDDEN))
    assert {each["code"] for each in said} <= {"UNAVAILABLE", "FAILED_PRECONDITION", "NOT_FOUND"}, said
    assert cost.peak_mib < cost.before_mib + _MOST_MIB
    assert elsewhere.requests == []
    lied_to.target.verify_kept(agent, _NEVER, _HIDDEN)


def test_after_all_lies_the_truth_is_served(vault: FakeVault, lied_to: Meter) -> None:
    with Child("tests.attacks.caller", LOUD, lied_to.target.socket) as loud:

        def served() -> bool:
            said: Any = loud.does("grpc", name="own", metadata=[])
            return bool(said.get("values") == {"value": lied_to.target.secrets["loud"]})

        until(served, "its own value")
