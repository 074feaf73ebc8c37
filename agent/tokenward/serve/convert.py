"""Domain values to protobuf messages. Protobuf stops here, and so do the secrets' wrappers."""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.timestamp_pb2 import Timestamp

from tokenward.core.model import AnyGrant, JwtGrant, Served
from tokenward.core.secret import Secret
from tokenward.errors import TokenwardError
from tokenward.serve.status import problem
from tokenward.v1 import credentials_pb2 as pb


def credential(served: Served) -> pb.Credential:
    """What a caller gets of `served`."""
    current = served.current
    message = pb.Credential(
        name=served.key.credential,
        kind=served.kind,
        version=current.number,
        values=_texts(current.issued.values),
        issued_at=timestamp(current.since.wall),
        expires_at=timestamp(current.issued.expires.wall),
        refresh_at=timestamp(current.due.wall),
        stale=served.stale,
        audience=served.key.audience,
    )
    if served.previous is not None and served.retire is not None:
        message.previous.version = served.previous.number
        message.previous.values.update(_texts(served.previous.issued.values))
        message.previous.retire_at.CopyFrom(timestamp(served.retire.wall))
    return message


def state(name: str, now: Served | TokenwardError) -> pb.CredentialState:
    """What a watcher is told of one credential."""
    if isinstance(now, Served):
        return pb.CredentialState(name=name, credential=credential(now))
    return pb.CredentialState(name=name, problem=problem(now))


def grant_info(grant: AnyGrant) -> pb.GrantInfo:
    """A grant without values."""
    audiences = grant.audiences if isinstance(grant, JwtGrant) else ()
    return pb.GrantInfo(name=grant.name, kind=grant.kind, scopes=grant.scopes, audiences=audiences)


def _texts(values: Mapping[str, Secret]) -> dict[str, str]:
    return {name: value.reveal() for name, value in values.items()}


def timestamp(wall: float) -> Timestamp:
    """Seconds since the epoch."""
    return Timestamp(seconds=int(wall), nanos=int(wall % 1 * 1e9))
