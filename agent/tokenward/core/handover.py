"""What one agent leaves to the next over a restart, as bytes and back. Pure.

Owns: the form of that state, and what of it is still good under the configuration and at the time of the agent that
takes over. Leaves to `tokenward.handover`: how the bytes get there and that they come from us. Invariants: `decode`
accepts what `encode` of the same format wrote and raises ValueError for all else, with nothing of the content in its
text; a lease that `alive` does not keep as a credential is either in `pending`, to be revoked, or has ended.

Monotonic times mean something within one boot alone; the bytes do not say of which one they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256

import msgspec

from tokenward.core.model import AnyGrant, Instant, Issued, Key, Version, Workload
from tokenward.core.secret import Secret

_MAGIC = b"tokenward-handover "
_FORMAT = b"1\n"
"""To be raised when a field gets another meaning. One more field with a default does not need it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """One live credential: what the store had of it. `retire` is None exactly when `previous` is."""

    key: Key
    grant_digest: str
    """`digest_of` the grant that it was obtained for."""
    current: Version
    previous: Version | None = None
    retire: Instant | None = None
    used_mono: float


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Everything that outlives a restart."""

    credentials: tuple[Held, ...]
    numbers: Mapping[Key, int]
    """The last version number of each key that was dropped: the count goes on when it comes back."""
    pending: tuple[tuple[Key, Issued], ...]
    """Leases whose revocation is still to be done."""
    fingerprint_key: bytes = field(repr=False)
    """What the audit log makes fingerprints with, so that one value keeps its fingerprint."""
    written: Instant


class _Wire(msgspec.Struct, frozen=True):
    """`State` in the form that is written: keys of a map cannot be objects. MessagePack, since it has infinity."""

    credentials: tuple[Held, ...]
    numbers: tuple[tuple[Key, int], ...]
    pending: tuple[tuple[Key, Issued], ...]
    fingerprint_key: bytes
    written: Instant


def encode(state: State) -> bytearray:
    """The state as bytes, secrets in clear: for a sealed memfd and nothing else. Wipe them after use.

    Raises ValueError for a text that is no Unicode.
    """
    wire = _Wire(
        credentials=state.credentials,
        numbers=tuple(state.numbers.items()),
        pending=state.pending,
        fingerprint_key=state.fingerprint_key,
        written=state.written,
    )
    made = bytearray(_MAGIC + _FORMAT)
    try:
        _encoder.encode_into(wire, made, len(made))
    except UnicodeEncodeError:
        raise ValueError("the state cannot be written: a text in it is no Unicode") from None  # it holds the text
    return made


def decode(data: bytes | bytearray) -> State:
    """The state that `encode` wrote. Raises ValueError for anything else."""
    if not data.startswith(_MAGIC):
        raise ValueError("this is no state of an agent")
    if not data.startswith(_MAGIC + _FORMAT):
        raise ValueError("the state has the format of another version of the agent")
    try:
        wire = _decoder.decode(memoryview(data)[len(_MAGIC + _FORMAT) :])
    except (msgspec.MsgspecError, ValueError, RecursionError, MemoryError):
        # `from None`: the text of some of these quotes the content.
        raise ValueError("the state is damaged: it is not of the form that its format says") from None
    state = State(
        credentials=wire.credentials,
        numbers=dict(wire.numbers),
        pending=wire.pending,
        fingerprint_key=wire.fingerprint_key,
        written=wire.written,
    )
    _verify_consistent(state, listed=len(wire.numbers))
    return state


def digest_of(grant: AnyGrant, workload: Workload, *, vault: str = "") -> str:
    """What makes a value of `grant` for `workload` what it is, in 64 hexadecimal digits; equal in every process.

    Who owns the workload and what for is not in it. `vault` is whatever names the vault that is asked.
    """
    granted = {"kind": grant.kind, **asdict(grant)}
    granted["policy"].pop("rate")  # how often one may ask says nothing of the value
    said = {
        "vault": vault,
        "spiffe_id": str(workload.spiffe_id),
        "selectors": sorted(map(str, workload.selectors)),
        "exchange": {"method": workload.exchange.method, **asdict(workload.exchange)},
        "grant": granted,
    }
    return sha256(msgspec.json.encode(said, order="deterministic")).hexdigest()


def alive(state: State, now: Instant, digests: Mapping[tuple[str, str], str]) -> State:
    """What of `state` is good at `now`. `digests` has the `digest_of` each grant there is, by workload and credential.

    What has expired is left out. A credential whose grant is gone or is another one becomes leases to revoke. Version
    numbers are kept of everything.
    """
    kept: list[Held] = []
    numbers = dict(state.numbers)
    ended = list(state.pending)
    for held in state.credentials:
        fits = digests.get((held.key.workload, held.key.credential)) == held.grant_digest
        if fits and held.current.issued.is_live(now):
            kept.append(_without_ended(held, now))
            continue
        numbers[held.key] = max(held.current.number, numbers.get(held.key, 0))
        ended += [(held.key, each.issued) for each in (held.previous, held.current) if each is not None]
    return State(
        credentials=tuple(kept),
        numbers=numbers,
        pending=tuple((key, issued) for key, issued in ended if issued.lease is not None and issued.is_live(now)),
        fingerprint_key=state.fingerprint_key,
        written=state.written,
    )


def _without_ended(held: Held, now: Instant) -> Held:
    """`held` without a previous version that has expired."""
    if held.previous is None or held.previous.issued.is_live(now):
        return held
    return Held(key=held.key, grant_digest=held.grant_digest, current=held.current, used_mono=held.used_mono)


def _verify_consistent(state: State, *, listed: int) -> None:
    """Raises ValueError for a state that no agent can be in."""
    keys = {held.key for held in state.credentials}
    consistent = (
        len(keys) == len(state.credentials)
        and listed == len(state.numbers)
        and all((held.previous is None) == (held.retire is None) for held in state.credentials)
        and all(held.current.number > 0 for held in state.credentials)
        and all(number >= 0 for number in state.numbers.values())
    )
    if not consistent:
        raise ValueError("the state is damaged: it contradicts itself")


def _revealed(value: object) -> str:
    """msgspec's `enc_hook`: a secret in clear, nothing else."""
    if isinstance(value, Secret):
        return value.reveal()
    raise TypeError(f"a {type(value).__name__} is no part of a state")


def _secret(kind: type, value: object) -> Secret:
    """msgspec's `dec_hook`: a secret from a text, nothing else."""
    if kind is Secret and isinstance(value, str):
        return Secret(value)
    raise ValueError("not a text")


_encoder = msgspec.msgpack.Encoder(enc_hook=_revealed)
_decoder = msgspec.msgpack.Decoder(_Wire, dec_hook=_secret)
