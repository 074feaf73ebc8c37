"""`tokenward admin`: what an operator asks of a running agent, over its admin socket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
import grpc
from google.protobuf.json_format import MessageToDict

from tokenward.client.errors import details_of, error_from
from tokenward.v1 import admin_pb2 as pb
from tokenward.v1 import admin_pb2_grpc as rpc

_DEFAULT_SOCKET = "/run/tokenward-admin/admin.sock"
_TIMEOUT_S = 15.0
_reason_option = click.option("--reason", required=True, help="Why, in one line. It goes into the audit record.")


@click.group()
@click.option("--socket", default=_DEFAULT_SOCKET, show_default=True, envvar="TOKENWARD_ADMIN_SOCKET")
@click.pass_context
def admin(context: click.Context, socket: str) -> None:
    """Manage a running agent. Values are never shown."""
    context.obj = socket


@admin.command()
@click.pass_obj
def status(socket: str) -> None:
    """Print what the agent holds and what is revoked, as JSON."""
    with _service(socket) as service:
        found = service.GetStatus(pb.GetStatusRequest(), timeout=_TIMEOUT_S)
    shown: dict[str, Any] = MessageToDict(found, preserving_proto_field_name=True)
    click.echo(json.dumps(shown, indent=2))


@admin.command()
@click.argument("workload")
@click.argument("credential")
@_reason_option
@click.pass_obj
def rotate(socket: str, workload: str, credential: str, reason: str) -> None:
    """Have the agent obtain a new value of a CREDENTIAL of a WORKLOAD now."""
    request = pb.RotateRequest(workload=workload, credential=credential, reason=reason)
    with _service(socket) as service:
        done = service.Rotate(request, timeout=_TIMEOUT_S)
    click.echo(f"{workload}/{credential} is at version {', '.join(map(str, done.versions))}")


def _scope_arguments(command: Any) -> Any:
    everything = click.option("--all", "everything", is_flag=True, help="Everything that this agent holds.")
    arguments = (click.argument("credential", required=False), click.argument("workload", required=False))
    for decorate in (*arguments, everything):
        command = decorate(command)
    return command


@admin.command()
@_scope_arguments
@_reason_option
@click.pass_obj
def revoke(socket: str, workload: str | None, credential: str | None, everything: bool, reason: str) -> None:
    """End a CREDENTIAL of a WORKLOAD, all of the workload's, or all there are, until `unblock`."""
    request = pb.RevokeRequest(scope=_scope(workload, credential, everything=everything), reason=reason)
    with _service(socket) as service:
        done = service.Revoke(request, timeout=_TIMEOUT_S)
    click.echo(f"{done.ended} values ended; nobody gets them again before `tokenward admin unblock`")
    if done.problem:
        click.echo(f"warning: a restarted agent would not know of it: {done.problem}", err=True)


@admin.command()
@_scope_arguments
@_reason_option
@click.pass_obj
def unblock(socket: str, workload: str | None, credential: str | None, everything: bool, reason: str) -> None:
    """Let callers have again what was revoked with the same words."""
    request = pb.UnblockRequest(scope=_scope(workload, credential, everything=everything), reason=reason)
    with _service(socket) as service:
        done = service.Unblock(request, timeout=_TIMEOUT_S)
    if not done.lifted:
        raise click.ClickException("nothing was revoked with these words; `tokenward admin status` lists what is")
    click.echo("lifted")


@admin.command()
@click.pass_obj
def reload(socket: str) -> None:
    """Have the agent read its configuration again: the whole takes effect, or nothing."""
    with _service(socket) as service:
        service.Reload(pb.ReloadRequest(), timeout=_TIMEOUT_S)
    click.echo("reloaded")


def _scope(workload: str | None, credential: str | None, *, everything: bool) -> pb.Scope:
    if everything == bool(workload):
        raise click.UsageError("name a workload, a workload and a credential, or --all")
    return pb.Scope(workload=workload or "", credential=credential or "")


@contextmanager
def _service(socket: str) -> Iterator[rpc.AdminServiceStub]:
    """The service at `socket`. Raises what the agent said as our errors."""
    options = (("grpc.default_authority", "localhost"), ("grpc.enable_http_proxy", 0))
    with grpc.insecure_channel(f"unix:{socket}", options=options) as channel:
        try:
            yield rpc.AdminServiceStub(channel)
        except grpc.RpcError as error:
            call: Any = error
            raise error_from(call.code(), call.details() or "", details_of(call)) from None
