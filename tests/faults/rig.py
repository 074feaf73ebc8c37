"""The rig: one vault, a fault proxy before it, the files of one agent, and the measuring of one fault.

    Setup     what the agent's configuration says, as far as a test cares
    Rig       a vault that is set up for it, the proxy, `agent()`
    measured  agent and callers run, a fault comes and goes; what it did is a `Report`
    verify    the invariants that hold after every fault

A fault is any context manager: entered, it goes wrong, and left, it is over.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from tests.agents import TOKENWARD, Process
from tests.faults.admin import Admin
from tests.faults.callers import Callers, Phase, Tally
from tests.faults.proxy import Call, FaultProxy
from tests.postgres import Postgres
from tests.site import CREATE, REVOKE, until
from tokenward.core.secret import Secret
from tokenward.errors import TokenwardError

_CONFIG = """
trust_domain = "test.example"

[environment]
name = "test"
vault_paths = ["tests", "database/creds", "transit/keys"]

[listen]
workload_socket = "{directory}/workload.sock"

[vault]
addresses = [{addresses}]
timeout = "{timeout}"

[vault.login]
method = "jwt"
role = "tokenward"

[vault.signing]
key_file = "{directory}/signing.pem"

[audit]
file = "{directory}/audit.jsonl"

[log]
level = "debug"

{more}

[policies.default]
refresh_at = {refresh_at:g}
overlap = "{overlap}"
max_ttl = "{max_ttl}"

[workloads.connector]
selectors = ["unix:uid:{uid}"]
exchange = {{ method = "signed_jwt" }}
{credentials}
"""
API = """
[workloads.connector.credentials.api]
kind = "kv"
path = "tests/api"
poll = "1s"
"""
TOKEN = """
[workloads.connector.credentials.token]
kind = "vault_token"
"""
PROOF = """
[workloads.connector.credentials.proof]
kind = "jwt"
path = "transit/keys/jwt"
audiences = ["far-end"]
ttl = "{ttl}"
"""
DB = """
[workloads.connector.credentials.db]
kind = "leased"
path = "database/creds/app"
"""
_CALLS_PER_FETCH = 3
"""At most: a login, the call itself, and the end of what went before."""
_OWN_CALLS = 3
"""What the agent may do for itself after an outage: look at the vault, log in, read the signing key."""


def text_of(seconds: float) -> str:
    """A duration as the configuration writes it."""
    return f"{round(seconds * 1000)}ms"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What an agent's configuration says. `credentials` are TOML tables; `names` are those that callers ask for."""

    names: tuple[str, ...] = ("api", "token", "proof")
    credentials: str = API + TOKEN + PROOF.format(ttl="10s")
    more: str = ""
    timeout_s: float = 0.5
    refresh_at: float = 0.3
    overlap_s: float = 2.0
    max_ttl_s: float = 10.0

    def config(self, directory: Path, addresses: Iterable[str]) -> str:
        return _CONFIG.format(
            directory=directory,
            addresses=", ".join(f'"{address}"' for address in addresses),
            timeout=text_of(self.timeout_s),
            more=self.more,
            refresh_at=self.refresh_at,
            overlap=text_of(self.overlap_s),
            max_ttl=text_of(self.max_ttl_s),
            uid=os.getuid(),
            credentials=self.credentials,
        )


WITH_DB = Setup(names=("api", "token", "proof", "db"), credentials=Setup().credentials + DB)


class Rig:
    """A vault at the Unix socket of `vault_address`, set up for `setup`, and the proxy through which the agent sees it.

    With `addresses` the agent is given those instead of the proxy's.
    """

    def __init__(
        self,
        *,
        directory: Path,
        vault_address: str,
        admin_token: Secret,
        setup: Setup | None = None,
        addresses: Sequence[str] = (),
        tcp: bool = False,
    ) -> None:
        self.directory = directory
        self.setup = setup or Setup()
        self.admin = Admin(vault_address, admin_token)
        self.proxy = FaultProxy(
            upstream=vault_address.removeprefix("unix://"), socket_path=str(directory / "proxy.sock"), tcp=tcp
        )
        self.socket = str(directory / "workload.sock")
        self._config = directory / "tokenward.toml"
        self._addresses = addresses
        self._tcp = tcp
        self._admin_token = admin_token
        self._secrets: set[str] = {admin_token.reveal()}

    @contextlib.contextmanager
    def ready(self, postgres: Postgres | None = None) -> Iterator[Rig]:
        """The proxy listens and the vault holds all that the configuration needs, while the block runs."""
        key_file = str(self.directory / "signing.pem")
        subprocess.run(["openssl", "ecparam", "-genkey", "-name", "prime256v1", "-noout", "-out", key_file], check=True)
        with self.proxy:
            seen = self.proxy.tcp_address if self._tcp else self.proxy.address
            self._config.write_text(self.setup.config(self.directory, self._addresses or [seen]))
            self._set_up(postgres)
            yield self

    def agent(self) -> Process:
        return Process("run", "--config", str(self._config))

    @contextlib.contextmanager
    def agent_after_killing(self, agent: Process) -> Iterator[Process]:
        """Another agent, in the place of `agent`, which cannot clean up."""
        os.kill(agent.pid, signal.SIGKILL)
        agent.stop()
        with self.agent() as another:
            yield another

    def tokens(self, *, least_s: int = 0) -> dict[str, float]:
        """The accessor of each token of the workload with `least_s` seconds to go at the vault; when it was made."""
        found = {}
        for accessor in self.admin.keys("auth/token/accessors"):
            with contextlib.suppress(TokenwardError):  # it may end while we look
                about = self.admin.call("POST", "auth/token/lookup-accessor", {"accessor": accessor})
                if str(about.get("display_name", "")).endswith("/connector") and about["ttl"] >= least_s:
                    found[accessor] = float(about["creation_time"])
        return found

    def leases(self) -> set[str]:
        """The database logins that the vault has leased."""
        return self.admin.keys("sys/leases/lookup/database/creds/app")

    def secrets(self) -> set[str]:
        """Every secret that the agent can have met, apart from what callers got."""
        return self._secrets | self.proxy.secrets()

    def put(self, name: str, value: str) -> None:
        """Writes a new version of the KV secret `tests/NAME`."""
        self._secrets.add(value)
        self.admin.call("POST", f"tests/data/{name}", {"data": {"value": value}})

    def _set_up(self, postgres: Postgres | None) -> None:
        done = subprocess.run(
            [TOKENWARD, "vault-setup", "--config", str(self._config), "--apply", "--token-file", "-"],
            input=self._admin_token.reveal(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        self.put("api", "a-value-of-the-api-that-nobody-logs")
        if postgres is not None:
            self._set_up_database(postgres)

    def _set_up_database(self, postgres: Postgres) -> None:
        self.admin.call("POST", "sys/mounts/database", {"type": "database"})
        host = f"127.0.0.1:{postgres.port}/postgres?connect_timeout=2"
        connection = {
            "plugin_name": "postgresql-database-plugin",
            "allowed_roles": ["app"],
            "connection_url": f"postgresql://{{{{username}}}}:{{{{password}}}}@{host}",
            "username": postgres.superuser,
            "password": postgres.password,
            "password_authentication": "scram-sha-256",
        }
        self.admin.call("POST", "database/config/pg", connection)
        ttl = f"{self.setup.max_ttl_s:g}s"
        life: dict[str, object] = {"db_name": "pg", "default_ttl": ttl, "max_ttl": ttl}
        statements = {"creation_statements": [CREATE], "revocation_statements": REVOKE}
        self.admin.call("POST", "database/roles/app", {**life, **statements})


# -- what one fault did ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rate:
    """Calls to the vault per second in one span of time."""

    mean: float
    peak: float
    """The most in any one second."""

    @staticmethod
    def of(calls: Sequence[Call], seconds: float) -> Rate:
        times = [call.mono for call in calls]
        peak = max((sum(start <= t < start + 1 for t in times) for start in times), default=0)
        return Rate(len(times) / seconds, float(peak))

    def __str__(self) -> str:
        return f"{self.mean:.1f}/{self.peak:.0f}"


@dataclass(kw_only=True)
class Report:
    """What callers saw of one fault, and what the vault saw of the agent before, while and after."""

    fault: str
    tally: Tally
    began: float
    ended: float
    """The fault's span on the wall clock."""
    fault_mono: tuple[float, float]
    fresh_s: float | None
    """From the end of the fault to the first value that is newer than any before; None: there was none."""
    all_fresh_s: float | None
    """The same for the last of the credentials."""
    before: Rate
    during: Rate
    after: Rate
    after_s: float
    asked_after: Counter[str]
    """What was asked for after the fault, and what came of it."""
    left: int
    """Tokens of which the agent knew (they are in its audit file) and that were there when it had stopped, apart from
    those at their very end: the vault counts in whole seconds."""
    log: str = field(repr=False)
    secrets: set[str] = field(repr=False)

    def line(self) -> str:
        """One line of the table."""
        tally = self.tally
        fresh = "-" if self.fresh_s is None else f"{self.fresh_s:.2f}"
        last = "-" if self.all_fresh_s is None else f"{self.all_fresh_s:.2f}"
        return (
            f"{self.fault:34} {len(tally.refused):6} {len(tally.expired):6} {sum(tally.errors.values()):6} {fresh:>7}"
            f" {last:>7}   {self.before!s:>9} {self.during!s:>9} {self.after!s:>9}"
            f"  {tally.latency_ms(Phase.BEFORE):6.1f} {tally.latency_ms(Phase.DURING):6.1f}"
        )


HEADING = """\
                                   errors to callers      s from end to       calls/s: mean/peak        p95 ms, warm
the fault                           valid expired  later     1st     all     before     while     after  before while"""


def measured(
    rig: Rig,
    name: str,
    fault: AbstractContextManager[object],
    *,
    callers: Callers | None = None,
    before_s: float = 2.5,
    fault_s: float = 3.5,
    after_s: float = 2.5,
) -> Report:
    """Runs an agent and its callers, lets `fault` happen, and stops the agent; prints the table's line."""
    callers = callers or Callers(rig.socket, rig.setup.names)
    with rig.agent() as agent:
        agent.wait_for_log("serving on")
        with callers:
            callers.wait_until_warm()
            steady_mono = time.monotonic()
            callers.go_on(before_s)
            with in_phase(callers, Phase.DURING):
                began, began_mono = time.time(), time.monotonic()
                with fault:
                    callers.go_on(fault_s)
            ended, ended_mono = time.time(), time.monotonic()
            first_s, last_s = callers.time_to_fresh(within_s=rig.setup.max_ttl_s)
            callers.go_on(max(0.0, ended_mono + after_s - time.monotonic()))
            after_mono = time.monotonic()
        stopped = agent.stop()
        log = agent.log()
    assert stopped == 0, log[-2000:]
    audit = (rig.directory / "audit.jsonl").read_text()
    calls = rig.proxy.calls
    report = Report(
        fault=name,
        tally=callers.tally,
        began=began,
        ended=ended,
        fault_mono=(began_mono, ended_mono),
        fresh_s=first_s,
        all_fresh_s=last_s,
        before=Rate.of(calls(steady_mono, began_mono), began_mono - steady_mono),
        during=Rate.of(calls(began_mono, ended_mono), ended_mono - began_mono),
        after=Rate.of(calls(ended_mono, after_mono), after_mono - ended_mono),
        after_s=after_mono - ended_mono,
        asked_after=Counter(f"{call.method} {call.path} {call.status}" for call in calls(ended_mono, after_mono)),
        left=sum(accessor in audit for accessor in rig.tokens(least_s=2)),
        log=log + audit,
        secrets=rig.secrets() | callers.tally.secrets,
    )
    print(f"\n{report.line()}")
    return report


@contextlib.contextmanager
def in_phase(callers: Callers, phase: Phase) -> Iterator[None]:
    """What callers meet meanwhile is counted under `phase`."""
    callers.phase = phase
    try:
        yield
    finally:
        callers.phase = Phase.AFTER


# -- what holds after every fault --------------------------------------------------------------------------------------


def verify(report: Report, *, credentials: int = 3) -> None:
    """The invariants that a report alone can show."""
    tally = report.tally
    assert tally.crashes == [], "a caller met something that is no error of ours"
    assert tally.expired == [], "an expired value was served"
    assert tally.refused == [], f"a valid value was refused\n{_tail(report.log)}"
    assert not tally.errors, f"the faults are shorter than a value lives, and yet: {tally.errors}\n{_tail(report.log)}"
    assert tally.oks > 0
    assert report.left == 0, f"an agent that stops in good health revokes what it holds\n{_tail(report.log)}"
    verify_no_storm(report, credentials=credentials)
    verify_no_secret_in(report.log, report.secrets)


def verify_no_storm(report: Report, *, credentials: int) -> None:
    """At most twice the steady rate after the fault, and what was put off: each credential may be overdue by one fetch,
    and the agent may have to see to itself."""
    overdue = credentials * _CALLS_PER_FETCH + _OWN_CALLS
    limit = 2 * report.before.mean + overdue / report.after_s
    said = f"{report.after.mean:.1f} calls/s after the fault, at most {limit:.1f}: {report.asked_after}"
    assert report.after.mean <= limit, f"{said}\n{_tail(report.log)}"


def verify_no_secret_in(text: str, secrets: Iterable[str]) -> None:
    """No secret is in the agent's log, at its most talkative, or in its audit file."""
    found = sum(secret in text for secret in secrets if secret)
    assert found == 0, f"{found} secrets are in the log or the audit file"


def verify_nothing_left(rig: Rig, reports: Iterable[Report] = ()) -> None:
    """Within twice its TTL, nothing is left at the vault of what the agents had made: of what they knew, and of what
    was made for a call whose answer never arrived."""
    with contextlib.suppress(AssertionError):
        until(lambda: not rig.tokens() and not rig.leases(), "nothing is left", within_s=2 * rig.setup.max_ttl_s)
    left = {accessor: _fault_at(made, reports) for accessor, made in rig.tokens().items()}
    assert left == {}, "tokens of the workload are left, made during these faults"
    assert rig.leases() == set(), "database logins are left"


def _fault_at(made: float, reports: Iterable[Report]) -> str:
    return next((report.fault for report in reports if report.began - 10 <= made <= report.ended + 15), "?")


def _tail(log: str) -> str:
    return "\n".join(line for line in log.splitlines() if not line.startswith("{"))[-1500:]
