"""One connection at the front door, from its first byte to its end, and the roster of all of them.

    WAITING   accepted, peer known, first bytes incomplete      -> JOINING, REFUSED
    JOINING   speaks gRPC; grpcio's backlog may be full         -> JOINED
    JOINED    bytes are passed on both ways
    REFUSED   has its HTTP answer; what still comes is discarded
    CLOSED    from each of them: the process ended, the time is up, a side closed, or the door says so

Owns a connection's descriptors and its name, and how fast one user's connections are read (`Intake`). Leaves the
judgement to `first_bytes`, the copying to `pump`, and who may come in to `front_door`. Invariants: a name is in the
roster before the first byte is passed on and gone before its socket closes, so it means one connection or nothing; each
descriptor is closed once, in `Connection.close`; WAITING and REFUSED connections can be closed at any time to make
room; whoever sends faster than its user may is read later, and what it was sent still reaches it.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from select import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT

from tokenward.attest.attestor import Attestor
from tokenward.attest.caller import Caller, Turns
from tokenward.attest.peer import Peer
from tokenward.core.rates import Rates
from tokenward.serve.first_bytes import Verdict, judge, refusal
from tokenward.serve.pump import Hop, Readiness

_JOIN_RETRY_S = 0.005
_SEND_BUFFER_BYTES = 32 << 10
"""Asked of the kernel, which takes the double: what waits there for a slow reader counts as our memory."""
_MAX_DISCARDED_BYTES = 1 << 20
"""How much of a refused request is read: closing with bytes unread would take the answer from its reader."""


_INTAKE_BURST_S = 0.125
"""How much of a second's worth may come at once: what passes here is worked on before what others send after it."""
_RESUMED_AT_ONCE = 4
_RESUME_EVERY_S = 0.004
"""A user's paused connections go on a few at a time, for the same reason."""


class Intake:
    """How fast each user's callers may send, in bytes a second over all of their connections.

    Whoever is over is not refused but not read, so the kernel's buffers fill and the sender waits: whatever costs us
    work, requests, resets or pings, the others' share of it stays theirs.
    """

    def __init__(self, *, bytes_per_s: float) -> None:
        self._rate = bytes_per_s
        self._burst = max(1.0, bytes_per_s * _INTAKE_BURST_S) if bytes_per_s < float("inf") else 1.0
        self._spent: Rates[int] = Rates()
        self._paused: dict[int, dict[Connection, None]] = {}
        """By uid, in order of their pausing."""

    def admits(self, connection: Connection, now_mono: float) -> bool:
        """Whether `connection` may be read now; if not, its `resume` is called once it may, and reads it."""
        uid = connection.peer.uid
        wait_s = self._wait_s(uid, now_mono)
        if not wait_s and uid not in self._paused:
            return True
        queue = self._paused.get(uid)
        if queue is None:
            queue = self._paused[uid] = {}
            asyncio.get_running_loop().call_later(max(wait_s, _RESUME_EVERY_S), self._resume, uid)
        queue[connection] = None
        return False

    def spend(self, uid: int, now_mono: float, count: int) -> None:
        """`count` bytes of `uid` were read."""
        self._spent.spend(uid, now_mono, rate=self._rate, cost=count)

    def forget(self, connection: Connection) -> None:
        """`connection` is gone."""
        if self._paused:
            self._paused.get(connection.peer.uid, {}).pop(connection, None)

    def _wait_s(self, uid: int, now_mono: float) -> float:
        return self._spent.wait_s(uid, now_mono, rate=self._rate, burst=self._burst)

    def _resume(self, uid: int) -> None:
        loop = asyncio.get_running_loop()
        queue = self._paused[uid]
        wait_s = self._wait_s(uid, loop.time())
        try:
            for connection in list(queue)[:_RESUMED_AT_ONCE]:
                if wait_s:
                    break
                del queue[connection]  # first: it may be back in the queue when it was read
                connection.resume(loop.time())
                wait_s = self._wait_s(uid, loop.time())
        finally:  # also for a bug of ours: nobody else would wake this user's others
            if queue:
                loop.call_later(max(wait_s, _RESUME_EVERY_S), self._resume, uid)
            else:
                del self._paused[uid]


class Roster:
    """Who is at the door, in order of arrival, and the names by which grpcio knows the joined ones."""

    def __init__(self) -> None:
        self.callers: dict[str, Caller] = {}
        """By what grpcio says in `context.peer()`."""
        self.empty = asyncio.Event()
        self._all: dict[Connection, None] = {}
        self._by_uid: Counter[int] = Counter()
        self._waiting: dict[Connection, None] = {}
        self._waiting_by_uid: dict[int, dict[Connection, None]] = {}

    def __len__(self) -> int:
        return len(self._all)

    def count_of(self, uid: int) -> int:
        """How many connections `uid` has."""
        return self._by_uid[uid]

    def oldest_waiting(self, uid: int | None = None) -> Connection | None:
        """Who can be sent away first, of `uid` or of all."""
        waiting = self._waiting if uid is None else self._waiting_by_uid.get(uid, {})
        return next(iter(waiting), None)

    def waiting(self) -> list[Connection]:
        """All that can be sent away."""
        return list(self._waiting)

    def all(self) -> list[Connection]:
        """Everybody."""
        return list(self._all)

    def enter(self, connection: Connection) -> None:
        """`connection` is here, and waits."""
        uid = connection.peer.uid
        self._all[connection] = None
        self._by_uid[uid] += 1
        self._waiting[connection] = None
        self._waiting_by_uid.setdefault(uid, {})[connection] = None
        self.empty.clear()

    def settle(self, connection: Connection) -> None:
        """`connection` waits no longer."""
        uid = connection.peer.uid
        if connection not in self._waiting:
            return
        del self._waiting[connection]
        del self._waiting_by_uid[uid][connection]
        if not self._waiting_by_uid[uid]:
            del self._waiting_by_uid[uid]

    def leave(self, connection: Connection) -> None:
        """`connection` is gone."""
        uid = connection.peer.uid
        self.settle(connection)
        del self._all[connection]
        self._by_uid[uid] -= 1
        if not self._by_uid[uid]:
            del self._by_uid[uid]
        if not self._all:
            self.empty.set()


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What every connection at one door shares."""

    roster: Roster
    readiness: Readiness
    attestor: Attestor
    turns: Turns
    intake: Intake
    inner_path: str
    first_bytes_s: float
    max_head_bytes: int


class Connection:
    """An accepted, non-blocking socket and the process at its other end. Everything runs in the event loop's thread."""

    __slots__ = ("_around", "_client", "_discarded", "_first", "_hop", "_inner", "_join_by", "_name", "_timer", "peer")

    def __init__(self, *, around: Surroundings, client: socket.socket, peer: Peer) -> None:
        self.peer = peer
        self._around = around
        self._client = client
        self._first = b""
        self._discarded = 0
        self._name = ""
        self._inner: socket.socket | None = None
        self._join_by = 0.0
        self._hop: Hop | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Enter the roster and look at what is there already: most clients have sent their first bytes by now."""
        self._around.roster.enter(self)
        self._take(self._begin)

    def close(self) -> None:
        """Take the name back, then close everything at once; unsent bytes are lost. Closing again does nothing."""
        if self._client.fileno() < 0:
            return
        around = self._around
        around.roster.callers.pop(self._name, None)
        if self._timer is not None:
            self._timer.cancel()
        around.intake.forget(self)
        around.readiness.forget(self.peer.pidfd)
        self.peer.close()
        for sock in (self._client, self._inner):
            if sock is not None:
                around.readiness.forget(sock.fileno())
                sock.close()
        self._hop = self._timer = None
        around.roster.leave(self)

    def resume(self, now_mono: float) -> None:
        """Read the client again, which was sending too fast."""
        hop = self._hop
        if hop is not None:
            hop.pause(False)  # noqa: FBT003 -- reads as it is meant
            self._pass_on(hop, EPOLLIN, now_mono)

    # -- what epoll reports: each step says whether that was the end ----------------------------------------------

    def _take(self, step: Callable[[int], bool], events: int = 0) -> None:
        over = True  # also for a bug of ours: a connection in an unknown state must not stay
        try:
            over = step(events)
        except BlockingIOError:
            over = False
        except OSError:
            pass  # the socket's way to say that the other side is gone
        finally:
            if over:
                self.close()

    def _on_exit(self, _events: int) -> None:
        self.close()

    def _on_waiting(self, _events: int) -> None:
        self._take(self._look)

    def _on_refused(self, _events: int) -> None:
        self._take(self._discard)

    def _on_client(self, events: int) -> None:
        hop = self._hop
        if hop is None:
            return
        now_mono = asyncio.get_running_loop().time()
        if not self._around.intake.admits(self, now_mono):
            if events & (EPOLLHUP | EPOLLERR):
                self.close()  # what it sent is for nobody any more
                return
            hop.pause(True)  # noqa: FBT003 -- reads as it is meant
            events &= EPOLLOUT
        self._pass_on(hop, events, now_mono)

    def _pass_on(self, hop: Hop, events: int, now_mono: float) -> None:
        before = hop.pulled
        self._take(hop.client_ready, events)
        if hop.pulled > before:
            self._around.intake.spend(self.peer.uid, now_mono, hop.pulled - before)

    def _on_inner(self, events: int) -> None:
        hop = self._hop
        if hop is not None:
            self._take(hop.inner_ready, events)

    # -- WAITING ---------------------------------------------------------------------------------------------------

    def _begin(self, _events: int = 0) -> bool:
        around = self._around
        self._client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        around.readiness.watch(self.peer.pidfd, EPOLLIN, self._on_exit)
        around.readiness.watch(self._client.fileno(), EPOLLIN, self._on_waiting)
        self._timer = asyncio.get_running_loop().call_later(around.first_bytes_s, self.close)
        return self._look()

    def _look(self, _events: int = 0) -> bool:
        data = self._client.recv(self._around.max_head_bytes - len(self._first))
        self._first += data
        verdict = judge(self._first, max_head_bytes=self._around.max_head_bytes)
        if not data:  # its last words; nothing at all is a connection that was only tried
            return not self._first or self._refuse(Verdict.MALFORMED)
        match verdict:
            case Verdict.UNDECIDED:
                return False
            case Verdict.GRPC:
                return self._speaks_grpc()
            case _:
                return self._refuse(verdict)

    # -- REFUSED ---------------------------------------------------------------------------------------------------

    def _refuse(self, verdict: Verdict) -> bool:
        self._client.send(refusal(verdict, self._first))
        self._client.shutdown(socket.SHUT_WR)
        self._first = b""
        self._around.readiness.watch(self._client.fileno(), EPOLLIN, self._on_refused)
        return False

    def _discard(self, _events: int = 0) -> bool:
        count = self._client.recv_into(self._around.readiness.buffer)
        self._discarded += count
        return not count or self._discarded > _MAX_DISCARDED_BYTES

    # -- JOINING, JOINED -------------------------------------------------------------------------------------------

    def _speaks_grpc(self) -> bool:
        self._around.roster.settle(self)
        self._around.readiness.forget(self._client.fileno())
        if self._timer is not None:
            self._timer.cancel()
        name = f"tokenward-{secrets.token_hex(16)}"
        self._inner = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._inner.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        self._inner.bind(f"\0{name}")
        self._name = f"unix-abstract:{name}"
        self._join_by = asyncio.get_running_loop().time() + self._around.first_bytes_s
        return self._join()

    def _join(self, _events: int = 0) -> bool:
        """Connect to grpcio; a full backlog fails at once with EAGAIN and cannot be waited for, only tried again."""
        around = self._around
        assert self._inner is not None
        try:
            self._inner.connect(around.inner_path)
        except BlockingIOError:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(_JOIN_RETRY_S, self._take, self._join)
            return loop.time() >= self._join_by
        around.roster.callers[self._name] = Caller(peer=self.peer, attestor=around.attestor, turns=around.turns)
        self._hop = Hop(readiness=around.readiness, client=self._client, inner=self._inner, first=self._first)
        self._first = b""
        self._hop.start(self._on_client, self._on_inner)
        return False
