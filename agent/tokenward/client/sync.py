"""`Client`: the agent's credentials for programs with threads.

Owns the waiting by threads, and the handle whose `.value` is a local read. Everything else is in `session`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from types import TracebackType
from typing import Self, TypeVar
from weakref import finalize

from tokenward.client.connection import ClosedError, CutOffError
from tokenward.client.credentials import Change, Credential, GrantInfo, Identity
from tokenward.client.handle import Handle
from tokenward.client.session import Changes, Deadline, Session, credential_in, grants_in, identity_in, replacement_in
from tokenward.client.slots import Slot
from tokenward.errors import TokenwardError

Answer = TypeVar("Answer")

_GRACE_S = 1.0
"""gRPC keeps the deadline; this much later we no longer rely on it."""


class Client:
    """Credentials of this process from the local agent.

        with Client() as client:
            login = client.get("ledger-db").values

        db = Client().credential("ledger-db")
        connect(user=db.value["username"], password=db.value["password"])   # always the current ones

    Without `socket` it is the one in `TOKENWARD_SOCKET`, else the system agent's, else that of `tokenward dev`.
    `timeout_s` is how long each call waits at most, also for an agent that is just being restarted. Making a client
    makes no connection. It is thread-safe, and may be used on both sides of a fork.
    """

    def __init__(self, socket: str | None = None, *, timeout_s: float = 5.0) -> None:
        self._session = Session(socket=socket, timeout_s=timeout_s)
        # Also at the interpreter's exit, which a thread inside gRPC would disturb.
        self._finalizer = finalize(self, self._session.close)

    @property
    def socket(self) -> str:
        """The path of the agent's socket."""
        return self._session.path

    def get(self, name: str, *, audience: str = "", timeout_s: float | None = None) -> Credential:
        """The credential `name` as it is now, asked of the agent. Raises TokenwardError.

        `audience` chooses one for kind `jwt`.
        """
        return credential_in(self._ask(lambda left_s: self._session.get(name, audience, left_s), timeout_s))

    def report_rejected(self, credential: Credential, *, timeout_s: float | None = None) -> Credential:
        """Tells the agent that `credential` was refused where it was used, such as by a 401; returns what there is now.

        The agent has a new value made at once, unless that was just done: compare the version. Raises TokenwardError.
        """
        return replacement_in(self._ask(lambda left_s: self._session.rejected(credential, left_s), timeout_s))

    def list_grants(self, *, timeout_s: float | None = None) -> tuple[GrantInfo, ...]:
        """What this process may ask for. Raises TokenwardError."""
        return grants_in(self._ask(self._session.grants, timeout_s))

    def identity(self, *, timeout_s: float | None = None) -> Identity:
        """Who the agent says this process is. Raises TokenwardError."""
        return identity_in(self._ask(self._session.identity, timeout_s))

    def credential(self, name: str) -> CredentialHandle:
        """A handle on `name` that is kept current in the background, beginning with its first use."""
        return CredentialHandle(self, self._session, self._session.watcher.slot(name))

    def watch(self, names: Iterable[str] = ()) -> Iterator[Change]:
        """Every change of `names` (of all grants if there are none), beginning with the state as it is now.

        Goes on over restarts of the agent until the client is closed. Raises TokenwardError when the agent refuses the
        watch, or is not there within the client's timeout at the beginning.
        """
        changes = Changes(self._session, names)
        try:
            while True:
                yield changes.next()
        except ClosedError:
            return
        finally:
            changes.cancel()

    def close(self) -> None:
        """Ends the background thread and the connection, and forgets every value. A second call does nothing."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, attempt: Callable[[float], Future[Answer]], timeout_s: float | None) -> Answer:
        deadline = self._session.deadline(timeout_s)
        while True:
            try:
                return _wait(attempt(deadline.left_s()), deadline)
            except CutOffError:
                pause_s = deadline.pause_s()
            except TimeoutError:
                pause_s = None
            except TokenwardError as refused:
                raise self._session.told(refused, deadline) from None
            if pause_s is None:
                raise self._session.out_of_time(deadline) from None
            time.sleep(pause_s)


def _wait(future: Future[Answer], deadline: Deadline) -> Answer:
    try:
        return future.result(deadline.left_s() + _GRACE_S)
    except BaseException:
        future.cancel()
        raise


class CredentialHandle(Handle):
    """One credential, kept current in the background by its client, for as long as the client is open.

    Its first use waits for the agent, at most the client's timeout; `name` and `on_change` never wait.
    """

    __slots__ = ("_client", "_session")

    def __init__(self, client: Client, session: Session, slot: Slot) -> None:
        super().__init__(slot)
        self._client = client  # as long as a handle is used, its client is not collected
        self._session = session

    @property
    def credential(self) -> Credential:
        """All that is known of the current version. Raises as `value` does."""
        session, slot = self._session, self._slot
        found = session.current(slot)
        if found is not None:
            return found
        deadline = session.deadline(None)
        with suppress(TimeoutError):
            slot.told.result(deadline.left_s())
            found = session.current(slot)
        if found is None:
            raise session.out_of_time(deadline)
        return found

    def on_change(self, callback: Callable[[Change], object]) -> None:
        """Has `callback` called with each change from now on, in the client's background thread: keep it short. What it
        raises is logged. It starts keeping the credential current, without waiting.
        """
        self._slot.callbacks.append(callback)
        self._session.watcher.keep(self._slot)
