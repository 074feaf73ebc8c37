"""Whether one address of the vault is worth asking now. Pure: clock and randomness are arguments.

    state      may be asked                  a success   a failure                no verdict    healthy
    closed     yes                           closed      the 3rd in a row: open   closed        closed
    open       no, and once its time is      closed      nothing: an older call   nothing       closed, on trial
               over one call is: half-open
    half-open  no: one call, the probe, is   closed      the probe's: open,       the probe's:  closed, on trial
               on its way                                for longer               open, due
    on trial   as closed                     closed      open                     on trial      on trial

Invariants: of the calls admitted since it opened at most one is on its way; it is never open for longer than 15 s; a
success closes it. It is not thread-safe: whoever owns it takes turns.
"""

from __future__ import annotations

from dataclasses import dataclass

FAILURES_TO_OPEN = 3
FIRST_S = 1.0
CAP_S = 15.0
_LEAST = 0.1


@dataclass(frozen=True, slots=True)
class Admission:
    """The right to one call, to be given back by `failed` or `released`; worth nothing after the state changed."""

    epoch: int


class Breaker:
    """One address's circuit breaker. Times are seconds of one monotonic clock, `draw` is in [0, 1)."""

    __slots__ = ("_epoch", "_failures", "_openings", "_probing", "_until_mono")

    def __init__(self) -> None:
        self._epoch = 0
        self._failures = 0
        self._openings = 0
        self._until_mono: float | None = None
        self._probing = False

    @property
    def is_closed(self) -> bool:
        """Whether any number of calls may be made."""
        return self._until_mono is None

    def wait_s(self, now_mono: float) -> float:
        """Seconds until a call may be admitted, 0 for now; a guess while a probe is on its way."""
        if self._until_mono is None:
            return 0.0
        return FIRST_S if self._probing else max(0.0, self._until_mono - now_mono)

    def admit(self, now_mono: float) -> Admission | None:
        """The right to make one call now, if there is one."""
        if self._until_mono is not None:
            if self._probing or now_mono < self._until_mono:
                return None
            self._probing = True
            self._epoch += 1
        return Admission(self._epoch)

    def succeeded(self) -> None:
        """Some call was answered, however long ago it was admitted."""
        self._failures = self._openings = 0
        self._close()

    def healthy(self) -> None:
        """The address says that it serves. Believed at once, though a first failure is then enough to open again."""
        if self._until_mono is not None:
            self._failures = FAILURES_TO_OPEN - 1
            self._close()

    def failed(self, admission: Admission, *, now_mono: float, draw: float) -> None:
        """The call failed in a way that speaks against the address."""
        if admission.epoch != self._epoch:
            return
        self._failures += 1
        if not self._probing and self._failures < FAILURES_TO_OPEN:
            return
        ceiling_s = min(CAP_S, FIRST_S * (1 << min(self._openings, 10)))
        self._until_mono = now_mono + ceiling_s * max(_LEAST, draw)
        self._openings += 1
        self._probing = False
        self._epoch += 1

    def released(self, admission: Admission) -> None:
        """The call ended and says nothing of the address: if it was the probe, the next caller's is."""
        if self._probing and admission.epoch == self._epoch:
            self._probing = False
            self._epoch += 1

    def _close(self) -> None:
        if self._until_mono is not None:
            self._until_mono = None
            self._probing = False
            self._epoch += 1
