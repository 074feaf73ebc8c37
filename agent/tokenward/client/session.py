"""What `Client` and `AsyncClient` share: everything but the waiting.

Owns one connection and one watcher, the requests, and how long an unanswered call is repeated. Leaves waiting, by
thread or by loop, to `sync` and `aio`. Invariant: a value leaves here only while it is valid.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future

from tokenward.client.address import socket_path, unreachable
from tokenward.client.connection import ClosedError, Connection, CutOffError
from tokenward.client.credentials import (
    Change,
    Credential,
    GrantInfo,
    Identity,
    credential_from,
    grant_from,
    identity_from,
)
from tokenward.client.errors import again
from tokenward.client.slots import Slot, is_same
from tokenward.client.watcher import Watcher, backoff_s, changes_in, draw
from tokenward.errors import InvalidRequestError, Reason, TokenwardError, UnavailableError
from tokenward.v1 import credentials_pb2 as pb

_LEAST_S = 0.001


class Deadline:
    """The time that one call has, over all its repetitions."""

    __slots__ = ("_attempt", "_end_mono", "timeout_s")

    def __init__(self, timeout_s: float) -> None:
        if timeout_s <= 0:
            raise InvalidRequestError(f"a timeout must be more than 0 seconds, not {timeout_s}")
        self.timeout_s = timeout_s
        self._end_mono = time.monotonic() + timeout_s
        self._attempt = 0

    def left_s(self) -> float:
        """Seconds left, a little more than none when the end has come."""
        return max(_LEAST_S, self._end_mono - time.monotonic())

    def pause_s(self) -> float | None:
        """Seconds to wait before the next repetition; None when no time is left for one."""
        self._attempt += 1
        pause_s = backoff_s(self._attempt, draw())
        return pause_s if time.monotonic() + pause_s < self._end_mono else None


class Session:
    """One client's way to the agent at `socket`, chosen by `socket_path`."""

    def __init__(self, *, socket: str | None, timeout_s: float) -> None:
        self.path = socket_path(socket)
        self.timeout_s = Deadline(timeout_s).timeout_s
        self.connection = Connection(path=self.path)
        self.watcher = Watcher(connection=self.connection)

    # -- calls: each gives the future of one attempt, which raises CutOffError when it should be repeated ------------

    def get(self, name: str, audience: str, timeout_s: float) -> Future[pb.GetCredentialResponse]:
        """One attempt at the credential `name`."""
        request = pb.GetCredentialRequest(name=name, audience=audience)
        return self.connection.unary(lambda stubs: stubs.credentials.GetCredential, request, timeout_s=timeout_s)

    def rejected(self, credential: Credential, timeout_s: float) -> Future[pb.ReportRejectedResponse]:
        """One attempt at telling that `credential` was refused where it was used."""
        request = pb.ReportRejectedRequest(
            name=credential.name, version=credential.version, audience=credential.audience
        )
        return self.connection.unary(lambda stubs: stubs.credentials.ReportRejected, request, timeout_s=timeout_s)

    def grants(self, timeout_s: float) -> Future[pb.ListGrantsResponse]:
        """One attempt at the list of grants."""
        return self.connection.unary(
            lambda stubs: stubs.credentials.ListGrants, pb.ListGrantsRequest(), timeout_s=timeout_s
        )

    def identity(self, timeout_s: float) -> Future[pb.GetIdentityResponse]:
        """One attempt at the caller's identity."""
        return self.connection.unary(
            lambda stubs: stubs.identity.GetIdentity, pb.GetIdentityRequest(), timeout_s=timeout_s
        )

    def deadline(self, timeout_s: float | None) -> Deadline:
        """A deadline from now: `timeout_s`, else the client's own."""
        return Deadline(self.timeout_s if timeout_s is None else timeout_s)

    def out_of_time(self, deadline: Deadline) -> TokenwardError:
        """Why nobody answered before `deadline`, found by looking at the socket."""
        return unreachable(self.path) or UnavailableError(
            Reason.DEADLINE_EXCEEDED,
            f"the agent at {self.path} did not answer within {deadline.timeout_s:g} s: allow more time, or see its log",
        )

    def told(self, failure: TokenwardError, deadline: Deadline) -> TokenwardError:
        """`failure` of a call, in our words where gRPC's own say less: a deadline of ours that passed."""
        return self.out_of_time(deadline) if failure.reason is Reason.DEADLINE_EXCEEDED else failure

    # -- values that are kept current ---------------------------------------------------------------------------------

    def current(self, slot: Slot) -> Credential | None:
        """What `slot` holds, which is kept current from now on; None while the agent has not said anything.

        Raises what the agent said, or UnavailableError when the value has expired.
        """
        self.watcher.keep(slot)
        change = slot.change
        if change.error is not None:
            raise again(change.error)
        if change.credential is None or slot.is_live(time.time()):
            return change.credential
        gone = unreachable(self.path)
        raise UnavailableError(
            Reason.EXPIRED,
            f"version {change.credential.version} of {slot.name!r} expired at {change.credential.expires_at} and there "
            f"is no newer one: {gone.public if gone is not None else 'see the log of the agent'}",
        )

    def close(self) -> None:
        """Ends everything and forgets every value."""
        self.watcher.stop()
        self.connection.close()
        self.watcher.close()


class Changes:
    """The changes of some credentials, one after the other, over as many streams as it takes.

    Like the watcher's thread it reconnects for ever; unlike it, it hands out what it hears and keeps no value for use.
    """

    def __init__(self, session: Session, names: Iterable[str]) -> None:
        self._session = session
        self._names = tuple(names)
        self._ended = threading.Event()
        self._stream = session.connection.stream(self._names)
        self._first = session.deadline(None)
        self._attempt = 0
        self._known: dict[str, Change] = {}
        self._ready: list[Change] = []

    def next(self) -> Change:
        """Waits for the next change.

        Raises the agent's refusal of the whole watch, UnavailableError when the agent was not there within the client's
        timeout, and ClosedError after `cancel`.
        """
        while not self._ready:
            try:
                self._take(changes_in(self._stream.read()))
            except CutOffError:
                self._reopen(None)
            except UnavailableError as refused:
                self._reopen(refused)
        return self._ready.pop(0)

    def cancel(self) -> None:
        """Ends a wait in `next`, from any thread."""
        self._ended.set()
        self._stream.cancel()

    def _take(self, changes: list[Change]) -> None:
        self._attempt = 0
        for change in changes:
            before = self._known.get(change.name)
            if before is None or not is_same(change, before):
                self._known[change.name] = change
                self._ready.append(change)

    def _reopen(self, refused: UnavailableError | None) -> None:
        self._attempt += 1
        pause_s = backoff_s(self._attempt, draw())
        if not self._known and self._first.left_s() <= pause_s:
            raise refused or self._session.out_of_time(self._first)
        if not self._ended.wait(pause_s):
            self._stream = self._session.connection.stream(self._names)
        if self._ended.is_set():
            self._stream.cancel()
            raise ClosedError("this watch has ended")


def credential_in(answer: pb.GetCredentialResponse) -> Credential:
    """The credential of an answer."""
    return credential_from(answer.credential)


def replacement_in(answer: pb.ReportRejectedResponse) -> Credential:
    """What there is instead of a credential that was refused."""
    return credential_from(answer.credential)


def grants_in(answer: pb.ListGrantsResponse) -> tuple[GrantInfo, ...]:
    """The grants of an answer."""
    return tuple(map(grant_from, answer.grants))


def identity_in(answer: pb.GetIdentityResponse) -> Identity:
    """The identity of an answer."""
    return identity_from(answer)
