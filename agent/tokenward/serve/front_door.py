"""The front door: accepts, asks the kernel who connected, and lets nobody take more than a share.

grpcio cannot tell who is at the other end of a Unix socket, so tokenward accepts itself. Of each connection the kernel
is asked for the peer before a byte is read. One that speaks gRPC is joined to grpcio's own listener from a socket that
is bound to a random abstract name; grpcio reports that name as `context.peer()`, and `FrontDoor.caller` knows whose it
is. Anything else gets an HTTP/1.1 answer in place.

Owns the accept step and the limits; `connection` is one connection's life, `pump` moves its bytes, `first_bytes` judges
what it speaks, `attest` asks the kernel. Invariant: whoever has said what it speaks is never sent away for a newcomer,
and whoever has not can be, its own user's connections first. No other package knows any of this.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import socket
from dataclasses import dataclass
from typing import NoReturn, Self

from tokenward.attest.attestor import Attestor
from tokenward.attest.caller import Caller, Turns
from tokenward.attest.peer import credentials_of, peer_of
from tokenward.core.rates import Rates
from tokenward.errors import DeniedError, Reason, TokenwardError
from tokenward.serve.connection import Connection, Intake, Roster, Surroundings
from tokenward.serve.pump import Readiness

_ACCEPTS_PER_WAKE = 16
"""Fewer than the events that `pump` handles per wake-up: who is in is served before who comes."""
_ACCEPT_PAUSE_S = 0.05
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})

_DESCRIPTORS_PER_CONNECTION = 4  # client, pidfd, our end of the hop and grpcio's
_DESCRIPTORS_RESERVED = 256  # everything else in the agent
_MOST_CONNECTIONS = 4096  # some 200 MB at worst; more is a decision for an operator

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DoorLimits:
    """What callers may take of the agent before anybody knows them. The defaults fit 1,024 descriptors."""

    max_connections: int = 192
    max_connections_per_uid: int = 96
    first_bytes_s: float = 5.0
    """Time to say what one speaks, and to take the answer where that is HTTP; then for grpcio to accept the hop."""
    max_head_bytes: int = 8192
    accept_rate: float = math.inf
    """Connections a second of one uid, beyond the first `max_connections_per_uid`."""
    intake_bytes_per_s: float = math.inf
    """What one uid may send once it speaks gRPC; more is read later."""
    max_attestations: int = 4
    """At a time; one uid has at most half of them."""

    @classmethod
    def within(cls, max_descriptors: int) -> Self:
        """Limits that never use up RLIMIT_NOFILE (negative: no limit), and leave half to other users than any one."""
        if max_descriptors < 0:
            return cls(max_connections=_MOST_CONNECTIONS, max_connections_per_uid=_MOST_CONNECTIONS // 2)
        fit = (max_descriptors - _DESCRIPTORS_RESERVED) // _DESCRIPTORS_PER_CONNECTION
        most = min(_MOST_CONNECTIONS, max(8, fit))
        return cls(max_connections=most, max_connections_per_uid=most // 2)


class FrontDoor:
    """Accepts on `listener` and passes gRPC on to the socket at `inner_path`. Closes neither."""

    def __init__(self, *, listener: socket.socket, inner_path: str, attestor: Attestor, limits: DoorLimits) -> None:
        self._listener = listener
        self.inner_path = inner_path
        """Where grpcio listens, as of when `serve` is called."""
        self._attestor = attestor
        self._limits = limits
        self._roster = Roster()
        self._accepted: Rates[int] = Rates()
        self._turns = Turns(most=limits.max_attestations)
        self._around: Surroundings | None = None
        """There while serving."""
        self._accepting = False
        self._resume: asyncio.TimerHandle | None = None
        self._said_at = float("-inf")

    @property
    def connections(self) -> int:
        """How many there are, whatever they speak."""
        return len(self._roster)

    def caller(self, peer_name: str) -> Caller:
        """Whose connection grpcio's `context.peer()` names.

        Raises DeniedError (UNKNOWN_PEER) for every name that is not of a live connection through this door.
        """
        caller = self._roster.callers.get(peer_name)
        if caller is None:
            raise DeniedError(Reason.UNKNOWN_PEER, "this connection did not come through the agent's public socket")
        return caller

    async def serve(self) -> NoReturn:
        """Accept until cancelled, then close every connection at once."""
        loop = asyncio.get_running_loop()
        readiness = Readiness(loop=loop)
        self._around = Surroundings(
            roster=self._roster,
            readiness=readiness,
            attestor=self._attestor,
            turns=self._turns,
            intake=Intake(bytes_per_s=self._limits.intake_bytes_per_s),
            inner_path=self.inner_path,
            first_bytes_s=self._limits.first_bytes_s,
            max_head_bytes=self._limits.max_head_bytes,
        )
        self._listener.settimeout(0)
        self._accepting = True
        loop.add_reader(self._listener.fileno(), self._accept)
        try:
            while True:
                await loop.create_future()
        finally:
            self.close()
            self._around = None
            readiness.close()

    def stop_accepting(self) -> None:
        """Let nobody in any more, and send away who has not said what it speaks. Before the listener is closed."""
        if self._accepting:
            self._accepting = False
            asyncio.get_running_loop().remove_reader(self._listener.fileno())
        if self._resume is not None:
            self._resume.cancel()
        for connection in self._roster.waiting():
            connection.close()

    async def drain(self, within_s: float) -> None:
        """Stop accepting and wait until the last connection ended; what is left after `within_s` seconds is closed.

        A gRPC connection ends when its client or grpcio's server ends it: stop that one at the same time.
        """
        self.stop_accepting()
        try:
            async with asyncio.timeout(within_s):
                while self.connections:
                    await self._roster.empty.wait()
        except TimeoutError:
            self.close()

    def close(self) -> None:
        """Stop accepting and close every connection at once."""
        self.stop_accepting()
        for connection in self._roster.all():
            connection.close()

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_PER_WAKE):
            try:
                client, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._pause(error)
                return
            client.settimeout(0)
            if self._is_too_fast(client):
                client.close()
                return  # and not at once the next one: whoever is in goes first
            self._admit(client)

    def _is_too_fast(self, client: socket.socket) -> bool:
        """Whether this uid connects too often: asked before anything that costs more than to ask it."""
        rate, burst = self._limits.accept_rate, self._limits.max_connections_per_uid
        try:
            _, uid, _ = credentials_of(client)
        except OSError:
            return True  # nobody can be told, and nobody is let in
        if not self._accepted.take(uid, asyncio.get_running_loop().time(), rate=rate, burst=burst):
            return False
        self._say("closed a new connection of uid %d: this user makes more than %g a second", uid, rate)
        return True

    def _admit(self, client: socket.socket) -> None:
        try:
            peer = peer_of(client)
        except TokenwardError as error:
            client.close()
            self._say("closed a new connection: %s", error.public)
            return
        if not self._make_room(peer.uid):
            peer.close()
            client.close()
            self._say("closed a new connection of uid %d: too many are open, of this user or in all", peer.uid)
            return
        assert self._around is not None
        Connection(around=self._around, client=client, peer=peer).start()

    def _make_room(self, uid: int) -> bool:
        """Whether `uid` may have one connection more, after the oldest that still waits was sent away if need be."""
        oldest = self._roster.oldest_waiting(uid)
        if self._roster.count_of(uid) < self._limits.max_connections_per_uid:
            if self.connections < self._limits.max_connections:
                return True
            oldest = oldest or self._roster.oldest_waiting()
        if oldest is None:
            return False
        oldest.close()
        return True

    def _pause(self, error: OSError) -> None:
        """Out of descriptors or memory: the listener stays readable, so trying again at once would be a busy loop."""
        oldest = self._roster.oldest_waiting()
        if oldest is not None:
            oldest.close()
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._listener.fileno())
        self._resume = loop.call_later(_ACCEPT_PAUSE_S, loop.add_reader, self._listener.fileno(), self._accept)
        self._say("cannot accept for %g s: %s", _ACCEPT_PAUSE_S, error.strerror)

    def _say(self, text: str, *facts: object) -> None:
        """Log at most once a second: callers decide how often this happens."""
        now = asyncio.get_running_loop().time()
        if now - self._said_at >= 1.0:
            self._said_at = now
            _log.warning(text, *facts)
