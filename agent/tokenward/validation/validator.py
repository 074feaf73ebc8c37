"""`Validator`: tries a new value as its grant asks, off the event loop and with one deadline for the whole.

Owns the threads, the deadline and the choice of check. Leaves the trying to `http` and `postgresql`, and the next
attempt to the caller: a login that was just made may be unknown to a replica for a moment. Invariant: it raises nothing
but ValidationError, whose text has words of ours only: neither the value nor anything that the far end wrote.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import assert_never

from tokenward.core.model import AnyGrant, AnyValidation, HttpValidation, Issued, PostgresqlValidation
from tokenward.errors import ValidationError
from tokenward.validation import http, postgresql


class Validator:
    """Tries new values, at most `threads` at a time. Its threads begin when there is something to try."""

    def __init__(self, *, threads: int = 8) -> None:
        self._threads = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="validation")

    async def check(self, grant: AnyGrant, issued: Issued) -> None:
        """Returns when the value is good, or the grant asks for no check. Tries once.

        Raises ValidationError when the far end refused the value or could not be asked within the grant's timeout.
        """
        if grant.validate is None:
            return
        try:
            async with asyncio.timeout(grant.validate.timeout_s):
                await asyncio.get_running_loop().run_in_executor(self._threads, _job(grant.validate, issued))
        except TimeoutError:
            where = _where(grant.validate)
            raise ValidationError(f"{where} could not be asked about the new value: it took too long") from None

    @staticmethod
    def missing(grants: Iterable[AnyGrant]) -> tuple[str, ...]:
        """What stands in the way of the checks that `grants` ask for, one sentence each; for the start of the agent.

        Imports what the checks need, where there are such grants.
        """
        if any(isinstance(grant.validate, PostgresqlValidation) for grant in grants):
            return postgresql.missing()
        return ()

    async def close(self) -> None:
        """Makes no check any more. Waits for none: those under way end by their timeouts."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _job(wanted: AnyValidation, issued: Issued) -> Callable[[], None]:
    match wanted:
        case HttpValidation():
            return functools.partial(http.check, wanted, issued.values)
        case PostgresqlValidation():
            return functools.partial(postgresql.check, wanted, issued.values)
    assert_never(wanted)


def _where(wanted: AnyValidation) -> str:
    match wanted:
        case HttpValidation():
            return http.where(wanted)
        case PostgresqlValidation():
            return postgresql.where(wanted)
    assert_never(wanted)
