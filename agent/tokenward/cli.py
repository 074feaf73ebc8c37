"""The command line: a thin shell over the client, the daemon and the vault's set-up.

Exit codes: 0 done, 1 refused, 2 usage, 3 unavailable (trying again later may help). Secrets
go to stdout and nowhere else.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Coroutine
from datetime import datetime
from typing import IO, TYPE_CHECKING, Any, NoReturn

from tokenward.core.secret import Secret
from tokenward.errors import ConfigError, Reason, TokenwardError

try:
    import click
except ImportError:  # pragma: no cover -- the base install is the client library alone
    sys.exit("tokenward: the command line needs more than the client library: pip install 'tokenward[agent]'")

if TYPE_CHECKING:
    from tokenward.client import Credential
    from tokenward.config import Config

_REFUSED = 1
_UNAVAILABLE = 3
_DEFAULT_CONFIG = "/etc/tokenward/tokenward.toml"

_config_option = click.option(
    "--config",
    "config_file",
    default=_DEFAULT_CONFIG,
    show_default=True,
    type=click.Path(dir_okay=False),
    help="The agent's configuration.",
)


class _WithAdmin(click.Group):
    """Knows `tokenward admin`, and imports it when it is used: the agent itself need not hold it in memory."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), "admin"])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == "admin":
            from tokenward.admincli import admin

            return admin
        return super().get_command(ctx, cmd_name)


@click.group(cls=_WithAdmin, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--socket",
    envvar="TOKENWARD_SOCKET",
    help="The agent's workload socket; /run/tokenward/workload.sock or that of your `tokenward dev` unless given.",
)
@click.version_option(package_name="tokenward")
@click.pass_context
def cli(context: click.Context, socket: str | None) -> None:
    """Short-lived, scoped credentials for attested local processes."""
    context.obj = socket


# -- for whoever uses credentials -----------------------------------------------------------------------------------


@cli.command()
@click.argument("name")
@click.option("--field", help="Print this field alone.")
@click.option("--audience", default="", help="The audience of a JWT, where the grant has several.")
@click.option("-o", "--output", type=click.Choice(["json", "raw"]), help="json: everything; raw: the one field's text.")
@click.pass_obj
def get(socket: str | None, name: str, field: str | None, audience: str, output: str | None) -> None:
    """Print the credential NAME as it is now."""
    from tokenward.client import Client

    with Client(socket) as client:
        credential = client.get(name, audience=audience)
    if output == "json" or (output is None and field is None):
        shown = _as_json(credential, fields=(field,) if field else None)
    else:
        shown = credential.values[_field(credential, field)]
    if sys.stdout.isatty():
        click.echo("tokenward: a secret follows on this terminal; pipe it to where it is used instead", err=True)
    click.echo(shown)


@cli.command()
@click.argument("names", nargs=-1)
@click.pass_obj
def watch(socket: str | None, names: tuple[str, ...]) -> None:
    """Print a line of JSON for each change of the credentials NAMES, or of all that are granted. Never a value."""
    from tokenward.client import Client

    with Client(socket) as client:
        for change in client.watch(names):
            if change.credential is not None:
                click.echo(_as_json(change.credential, fields=()))
            elif change.error is not None:
                told = {"name": change.name, "reason": change.error.reason, "message": change.error.public}
                click.echo(json.dumps(told))


@cli.command()
@click.pass_obj
def whoami(socket: str | None) -> None:
    """Print who the agent says you are, and what you may have."""
    from tokenward.client import Client

    with Client(socket) as client:
        identity = client.identity()
        grants = client.list_grants()
    shown = {
        "spiffe_id": identity.spiffe_id,
        "workload": identity.workload,
        "selectors": list(identity.selectors),
        "credentials": {grant.name: grant.kind for grant in grants},
    }
    click.echo(json.dumps(shown, indent=2))


@cli.command()
@click.option("--socket", "own_socket", help="The agent's workload socket, as for `tokenward --socket`.")
@click.option("--live", is_flag=True, help="Ask only whether the agent answers at all, ready or not.")
@click.option("--timeout", "timeout_s", default=3.0, show_default=True, type=click.FloatRange(0, 60, min_open=True))
@click.pass_obj
def health(socket: str | None, own_socket: str | None, live: bool, timeout_s: float) -> None:
    """Say whether the agent is ready, for probes: exit 0 if it is, else 1 with the reason."""
    from tokenward import health as asking

    try:
        asking.verify(own_socket or socket, is_live_enough=live, timeout_s=timeout_s)
    except TokenwardError as error:
        click.echo(f"tokenward: {error.public}", err=True)
        sys.exit(_REFUSED)


def _field(credential: Credential, field: str | None) -> str:
    fields = sorted(credential.values)
    if field is None and len(fields) == 1:
        return fields[0]
    if field is None or field not in credential.values:
        raise click.UsageError(f"{credential.name} has the fields {', '.join(fields)}: choose one with --field")
    return field


def _as_json(credential: Credential, *, fields: tuple[str, ...] | None) -> str:
    shown: dict[str, Any] = {"name": credential.name, "kind": credential.kind, "version": credential.version}
    if fields is None or fields:
        shown["values"] = {name: credential.values[_field(credential, name)] for name in fields or credential.values}
    for name in ("issued_at", "expires_at", "refresh_at"):
        when: datetime | None = getattr(credential, name)
        shown[name] = when.isoformat() if when is not None else None
    return json.dumps(shown | {"stale": credential.stale}, indent=2 if fields != () else None)


# -- for whoever runs the agent -------------------------------------------------------------------------------------


@cli.command()
@_config_option
def run(config_file: str) -> None:
    """Run the agent until SIGTERM. SIGHUP has it read its configuration again."""
    from tokenward import hardening

    notes = (*hardening.verify_switches(), *hardening.protect())  # systemd may have passed secrets of the agent before
    config = _load(config_file)
    for note in notes:
        logging.getLogger(__name__).log(note.level, "%s", note.text)

    async def serve() -> None:
        from tokenward import daemon

        life = daemon.Life()
        life.obey_signals()
        await daemon.run(config, life=life)

    _run_loop(serve)
    logging.shutdown()
    os._exit(0)  # everything is done; a thread that waits for a vault must not hold up the next agent


@cli.command()
@_config_option
def check(config_file: str) -> None:
    """Check a configuration without running anything: every mistake at once, with its line."""
    from tokenward import config as configuration

    config = configuration.load(config_file)
    for warning in config.warnings:
        click.echo(f"warning: {warning}")
    grants = sum(len(workload.grants) for workload in config.workloads.values())
    click.echo(
        f"{config_file}: {len(config.workloads)} workloads, {grants} credentials, {len(config.warnings)} warnings"
    )


@cli.command()
@click.option("--dir", "directory", type=click.Path(file_okay=False), help="Where to keep sockets and files.")
@click.option("--json", "as_json", is_flag=True, help="Say that it is ready as one JSON object.")
@click.option("--log-level", default="warning", show_default=True, type=click.Choice(["debug", "info", "warning"]))
def dev(directory: str | None, as_json: bool, log_level: str) -> None:
    """Run an agent beside an embedded OpenBao, with a few credentials for the current user."""
    from tokenward import hardening, logs

    hardening.quiet_grpc()
    from tokenward import dev as development

    logs.configure(log_level)
    where = os.path.abspath(directory or development.default_directory())
    _run_loop(lambda: development.run(where, as_json=as_json))


@cli.command("vault-setup")
@_config_option
@click.option("--apply", "do_apply", is_flag=True, help="Make it so; without this, print what would be made.")
@click.option("--token-file", type=click.File("r"), help="An administrator's vault token, for --apply; - is stdin.")
def vault_setup(config_file: str, do_apply: bool, token_file: IO[str] | None) -> None:
    """Print or make what the vault needs: mounts, roles, one least-privilege policy per workload."""
    from tokenward import assembly
    from tokenward.vault import setup

    config = _load(config_file)
    signer = assembly.signer_of(config.vault)
    steps = setup.plan(config, public_key_pem=signer.public_pem() if signer is not None else "")
    if not do_apply:
        click.echo(setup.render(steps))
        return
    if token_file is None:
        raise click.UsageError("--apply needs an administrator's vault token: --token-file FILE, or - for stdin")
    token = Secret(token_file.read().strip())

    async def make() -> None:
        client = assembly.client_of(config.vault)
        try:
            for outcome in await setup.apply(client, token, steps):
                click.echo(outcome)
        finally:
            await client.close()

    _run_loop(make)


def _load(config_file: str) -> Config:
    from tokenward import config as configuration
    from tokenward import logs

    config = configuration.load(config_file)
    logs.configure(config.log.level, form=config.log.format)
    for warning in config.warnings:
        logging.getLogger(__name__).warning("%s", warning)
    return config


def _run_loop(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    import uvloop

    try:
        uvloop.run(main())
    except* TokenwardError as group:
        raise _first(group) from None


def _first(group: BaseExceptionGroup[TokenwardError]) -> TokenwardError:
    for error in group.exceptions:
        return _first(error) if isinstance(error, BaseExceptionGroup) else error
    return TokenwardError(Reason.INTERNAL, "the agent failed without a reason")


def main() -> NoReturn:
    """The `tokenward` command."""
    try:
        cli(standalone_mode=True)
    except ConfigError as error:
        for problem in error.problems:
            click.echo(str(problem), err=True)
        sys.exit(_REFUSED)
    except TokenwardError as error:
        click.echo(f"tokenward: {error.public} ({error.reason})", err=True)
        sys.exit(_UNAVAILABLE if error.retryable else _REFUSED)
    except BrokenPipeError:
        sys.exit(_REFUSED)
    sys.exit(0)


if __name__ == "__main__":
    main()
