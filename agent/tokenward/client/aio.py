"""`AsyncClient`: the agent's credentials for programs on asyncio.

Owns the waiting by an event loop. It runs on the same session as `Client`, whose futures and thread it bridges to the
loop: no second implementation, any loop, the same behaviour when the parent forks. Everything else is in `session`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Self, TypeVar
from weakref import finalize

from tokenward.client.connection import ClosedError, CutOffError
from tokenward.client.credentials import Change, Credential, GrantInfo, Identity
from tokenward.client.handle import Handle
from tokenward.client.session import Changes, Session, credential_in, grants_in, identity_in, replacement_in
from tokenward.client.slots import Slot
from tokenward.errors import TokenwardError

Answer = TypeVar("Answer")

_GRACE_S = 1.0
"""gRPC keeps the deadline; this much later we no longer rely on it."""


class AsyncClient:
    """Credentials of this process from the local agent, for asyncio. Belongs to the loop that it is used in first.

        async with AsyncClient() as client:
            db = await client.credential("ledger-db")
            await connect(user=db.value["username"], password=db.value["password"])   # always the current ones

    Arguments as for `Client`. In a forked child make a new one, along with the new loop.
    """

    def __init__(self, socket: str | None = None, *, timeout_s: float = 5.0) -> None:
        self._session = Session(socket=socket, timeout_s=timeout_s)
        self._finalizer = finalize(self, self._session.close)

    @property
    def socket(self) -> str:
        """The path of the agent's socket."""
        return self._session.path

    async def get(self, name: str, *, audience: str = "", timeout_s: float | None = None) -> Credential:
        """The credential `name` as it is now, asked of the agent. Raises TokenwardError.

        `audience` chooses one for kind `jwt`.
        """
        return credential_in(await self._ask(lambda left_s: self._session.get(name, audience, left_s), timeout_s))

    async def report_rejected(self, credential: Credential, *, timeout_s: float | None = None) -> Credential:
        """Tells the agent that `credential` was refused where it was used, such as by a 401; returns what there is now.

        The agent has a new value made at once, unless that was just done: compare the version. Raises TokenwardError.
        """
        return replacement_in(await self._ask(lambda left_s: self._session.rejected(credential, left_s), timeout_s))

    async def list_grants(self, *, timeout_s: float | None = None) -> tuple[GrantInfo, ...]:
        """What this process may ask for. Raises TokenwardError."""
        return grants_in(await self._ask(self._session.grants, timeout_s))

    async def identity(self, *, timeout_s: float | None = None) -> Identity:
        """Who the agent says this process is. Raises TokenwardError."""
        return identity_in(await self._ask(self._session.identity, timeout_s))

    async def credential(self, name: str) -> AsyncCredentialHandle:
        """A handle on `name`, kept current in the background, with its first value there. Raises TokenwardError."""
        session = self._session
        slot = session.watcher.slot(name)
        if session.current(slot) is None:
            deadline = session.deadline(None)
            if not await _until(slot.told, deadline.left_s()):
                raise session.out_of_time(deadline)
            session.current(slot)
        return AsyncCredentialHandle(self, session, slot)

    async def watch(self, names: Iterable[str] = ()) -> AsyncIterator[Change]:
        """Every change of `names` (of all grants if there are none), beginning with the state as it is now.

        Goes on over restarts of the agent until the client is closed. Raises TokenwardError when the agent refuses the
        watch, or is not there within the client's timeout at the beginning.
        """
        changes = Changes(self._session, names)
        reader = ThreadPoolExecutor(1, thread_name_prefix="tokenward-changes")
        try:
            while True:
                yield await asyncio.get_running_loop().run_in_executor(reader, changes.next)
        except ClosedError:
            return
        finally:
            changes.cancel()
            reader.shutdown(wait=False)

    async def close(self) -> None:
        """Ends the background thread and the connection, and forgets every value. A second call does nothing."""
        await asyncio.to_thread(self._finalizer)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _ask(self, attempt: Callable[[float], Future[Answer]], timeout_s: float | None) -> Answer:
        deadline = self._session.deadline(timeout_s)
        while True:
            try:
                async with asyncio.timeout(deadline.left_s() + _GRACE_S):
                    return await asyncio.wrap_future(attempt(deadline.left_s()))
            except CutOffError:
                pause_s = deadline.pause_s()
            except TimeoutError:
                pause_s = None
            except TokenwardError as refused:
                raise self._session.told(refused, deadline) from None
            if pause_s is None:
                raise self._session.out_of_time(deadline) from None
            await asyncio.sleep(pause_s)


async def _until(done: Future[None], timeout_s: float) -> bool:
    """Whether `done` is done within `timeout_s`; the waiting never cancels it, it is everybody's."""
    loop = asyncio.get_running_loop()
    passed = asyncio.Event()

    def pass_on(_: Future[None]) -> None:
        with suppress(RuntimeError):  # the loop is closed, so nobody is left to tell
            loop.call_soon_threadsafe(passed.set)

    done.add_done_callback(pass_on)
    try:
        async with asyncio.timeout(timeout_s):
            await passed.wait()
    except TimeoutError:
        return False
    return True


class AsyncCredentialHandle(Handle):
    """One credential, kept current in the background by its client, for as long as the client is open.

    Nothing here waits: the first value was there when the client gave the handle out.
    """

    __slots__ = ("_client", "_session")

    def __init__(self, client: AsyncClient, session: Session, slot: Slot) -> None:
        super().__init__(slot)
        self._client = client  # as long as a handle is used, its client is not collected
        self._session = session

    @property
    def credential(self) -> Credential:
        """All that is known of the current version. Raises as `value` does."""
        found = self._session.current(self._slot)
        if found is None:
            raise self._session.out_of_time(self._session.deadline(None))
        return found

    def on_change(self, callback: Callable[[Change], object]) -> None:
        """Has `callback` called with each change from now on, in the running loop. What it raises goes to the loop's
        exception handler.
        """
        loop = asyncio.get_running_loop()
        self._slot.callbacks.append(lambda change: _call_soon(loop, callback, change))


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[[Change], object], change: Change) -> None:
    with suppress(RuntimeError):  # the loop is closed, so nobody is left to tell
        loop.call_soon_threadsafe(callback, change)
