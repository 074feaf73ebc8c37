"""What is attacked, and what an attack cost: an agent that serves three users, one of them a well-behaved caller.

    Target      files, vault and agent; each workload has a secret of its own, all of which begin with `planted-`
    Bystander   the well-behaved caller, a process of another user than any attacker
    attacked    measures the agent and the bystander while an attack runs; prints its line of the table

Users: STRANGER has no workload, LOUD has one and misbehaves, HELD is held to a program too, BYSTANDER behaves.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.agents import TOKENWARD, Process
from tests.faults.admin import Admin
from tests.openbao import Bao
from tests.site import until
from tokenward.core.secret import Secret

BYSTANDER, LOUD, HELD, STRANGER = 4201, 4202, 4203, 4242
FULL = os.environ.get("TOKENWARD_ATTACKS") == "full"
SECONDS = 10.0 if FULL else 1.5
CONNECTIONS = 10_000 if FULL else 2_000
LEAST_S = 0.3
ROOT = Path(__file__).parents[2]

_CONFIG = """
trust_domain = "test.example"

[environment]
name = "test"
vault_paths = ["tests"]

[listen]
workload_socket = "{directory}/workload.sock"
admin_socket = "{directory}/admin/admin.sock"

[vault]
addresses = ["{vault}"]
{login}
[vault.signing]
key_file = "{directory}/signing.pem"

[audit]
file = "{directory}/audit.jsonl"

[state]
file = "{directory}/state.json"

[log]
level = "debug"

[policies.default]
overlap = "1s"
max_ttl = "10m"

[workloads.bystander]
selectors = ["unix:uid:{bystander}"]
exchange = {{ method = "signed_jwt" }}

[workloads.bystander.credentials.own]
kind = "kv"
path = "tests/bystander"

[workloads.loud]
selectors = ["unix:uid:{loud}"]
exchange = {{ method = "signed_jwt" }}

[workloads.loud.credentials.own]
kind = "kv"
path = "tests/loud"

[workloads.loud.credentials.token]
kind = "vault_token"

[workloads.held]
selectors = ["unix:uid:{held}", "unix:path:{program}"]
exchange = {{ method = "signed_jwt" }}

[workloads.held.credentials.own]
kind = "kv"
path = "tests/held"
"""
_LOGIN = """
[vault.login]
method = "jwt"
role = "tokenward"
"""
WORKLOADS = ("bystander", "loud", "held")


class Target:
    """The files of one agent in `directory`, which other users may enter, and the secrets that are planted for it."""

    def __init__(self, directory: Path, vault_address: str, *, login: bool = True) -> None:
        directory.chmod(0o755)
        (directory / "admin").mkdir(mode=0o700)
        self.directory = directory
        self.socket = str(directory / "workload.sock")
        self.admin_socket = str(directory / "admin" / "admin.sock")
        self.config = directory / "tokenward.toml"
        self.secrets = {name: f"planted-{name}-{os.urandom(16).hex()}" for name in WORKLOADS}
        self.config.write_text(
            _CONFIG.format(
                directory=directory,
                vault=vault_address,
                login=_LOGIN if login else "",
                bystander=BYSTANDER,
                loud=LOUD,
                held=HELD,
                program=os.path.realpath(sys.executable),
            )
        )
        key = str(directory / "signing.pem")
        subprocess.run(["openssl", "ecparam", "-genkey", "-name", "prime256v1", "-noout", "-out", key], check=True)

    def set_up(self, vault: Bao) -> Self:
        """Has `vault-setup` make what the vault needs, and plants the secrets."""
        done = subprocess.run(
            [TOKENWARD, "vault-setup", "--config", str(self.config), "--apply", "--token-file", "-"],
            input=vault.admin_token.reveal(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        admin = Admin(vault.address, vault.admin_token)
        for name, secret in self.secrets.items():
            admin.call("POST", f"tests/data/{name}", {"data": {"value": secret}})
        return self

    def agent(self) -> Process:
        return Process("run", "--config", str(self.config))

    def audit(self) -> list[dict[str, Any]]:
        return [json.loads(line)["record"] for line in (self.directory / "audit.jsonl").read_text().splitlines()]

    def places(self, agent: Process) -> dict[str, bytes]:
        """All that the agent wrote, and what anybody may read of its process, by name."""
        files = [path for path in self.directory.rglob("*") if path.is_file()]
        found = {str(path): path.read_bytes() for path in files}
        found["log"] = log_of(agent)
        for name in ("environ", "cmdline"):
            found[name] = Path(f"/proc/{agent.pid}/{name}").read_bytes()
        return found

    def verify_kept(self, agent: Process, *secrets: str | Secret) -> None:
        """None of the planted secrets, nor of `secrets`, is in the log, a file, the environment or the arguments."""
        hidden = [text.reveal() if isinstance(text, Secret) else text for text in (*self.secrets.values(), *secrets)]
        places = self.places(agent)
        assert [where for where, content in places.items() for text in hidden if text.encode() in content] == []


def log_of(agent: Process) -> bytes:
    """What it said, as bytes: grpcio's own lines may quote what callers sent."""
    file = agent._log.fileno()
    return os.pread(file, os.fstat(file).st_size, 0)


# -- children of other users ------------------------------------------------------------------------------------------


class Child:
    """`python -m MODULE ARGUMENTS`, that talks in lines of JSON; it ends with the block."""

    def __init__(self, module: str, *arguments: object, python: str = sys.executable) -> None:
        # A copy of the interpreter finds neither its library nor its packages by itself.
        paths = {"PYTHONHOME": sys.base_prefix, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [python, "-m", module, *map(str, arguments)],
            cwd=ROOT,
            env=os.environ if python == sys.executable else {**os.environ, **paths},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def says(self, text: str = "") -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(text + "\n")
        self._process.stdin.flush()

    def line(self) -> str:
        """Its next line, waited for."""
        assert self._process.stdout is not None
        text = self._process.stdout.readline().strip()
        assert text, f"{self._process.args!r} ended with {self._process.poll()}"
        return text

    def does(self, do: str, **how: object) -> Any:
        """Its answer to a command, as `tests.attacks.caller` takes them."""
        self.says(json.dumps({"do": do, **how}))
        return self.told()

    def told(self) -> Any:
        """Its next line, as JSON."""
        return json.loads(self.line())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """Kills it; a second call does nothing."""
        self._process.kill()
        self._process.communicate()


@dataclass(frozen=True, slots=True)
class Seen:
    """What the bystander met in one span of time, on its kept connection and on new ones."""

    asked: int
    errors: tuple[str, ...]
    kept_p99_ms: float
    new_p99_ms: float


class Bystander(Child):
    """The well-behaved caller."""

    def __init__(self, target: Target) -> None:
        super().__init__("tests.attacks.bystander", BYSTANDER, target.socket)
        self.quiet = Seen(0, (), 0.0, 0.0)
        """What it met while nothing else was asked of the agent."""

    def seen(self) -> Seen:
        """What it met since it was asked last."""
        self.says()
        told = self.told()
        kept, new = told["kept"], told["new"]
        errors = (*kept["errors"], *new["errors"])
        return Seen(kept["asked"] + new["asked"], errors, kept["p99_ms"], new["p99_ms"])


# -- what it costs ----------------------------------------------------------------------------------------------------


def _status_kib(pid: int, key: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def resident_mib(pid: int, key: str = "VmRSS") -> float:
    """Resident memory now, or its peak with VmHWM."""
    return _status_kib(pid, key) / 1024


def descriptors(pid: int) -> int:
    """How many it has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def cpu_s(pid: int) -> float:
    """Processor time that it used, in user mode and in the kernel."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass(slots=True, kw_only=True)
class Cost:
    """What one attack did: to the agent, to the bystander, and for the attacker."""

    attack: str
    seconds: float = 0.0
    cpu_s: float = 0.0
    before_mib: float = 0.0
    peak_mib: float = 0.0
    descriptors: tuple[int, int, int] = (0, 0, 0)
    """Before, at the attack's height, and when it was over."""
    audit_kib: float = 0.0
    log_kib: float = 0.0
    """What grew on the disk."""
    got: int = 0
    """Secrets that were not the attacker's to have."""
    tally: Mapping[str, Any] = field(default_factory=dict)
    seen: Seen = Seen(0, (), 0.0, 0.0)
    calm_s: float = 0.0
    """From the end of the attack until the bystander is served as before."""

    def line(self, quiet: Seen) -> str:
        """One line of the table."""
        before, high, after = self.descriptors
        seen = self.seen
        did = " ".join(f"{key}={value}" for key, value in self.tally.items() if value and not isinstance(value, dict))
        return (
            f"{self.attack:27}{self.got:4}{self.cpu_s:7.2f}/{self.seconds:4.1f}s{self.before_mib:6.0f}{self.peak_mib:6.0f}"
            f"{before:7}{high:6}{after:5}{self.audit_kib:7.0f}{self.log_kib:6.0f}  {len(seen.errors):4}/{seen.asked:<4}"
            f"{seen.kept_p99_ms:7.1f}{quiet.kept_p99_ms:6.1f}{seen.new_p99_ms:7.1f}{quiet.new_p99_ms:6.1f}"
            f"{self.calm_s:6.1f}  {did}"
        )


HEADING = """
                                    agent's      MiB        descriptors     KiB of     bystander  p99 ms, kept     new   s to
attack                      got     CPU/of     was  peak  before high after  audit   log  errors      now quiet    now quiet  calm  did"""  # noqa: E501


class Meter:
    """Measures one agent and its bystander."""

    def __init__(self, target: Target, agent: Process, bystander: Bystander) -> None:
        self.target = target
        self.agent = agent
        self.bystander = bystander

    @contextlib.contextmanager
    def attacked(self, attack: str) -> Iterator[Cost]:
        """The block runs the attack, to its height, and sets `tally` and `got`; what it opened is closed on leaving.

        Nothing may be left open when the block ends: descriptors must come back to within a tenth of what they were.
        """
        pid, audit = self.agent.pid, self.target.directory / "audit.jsonl"
        cost = Cost(attack=attack, before_mib=resident_mib(pid))
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak begins anew
        before, written, used = descriptors(pid), audit.stat().st_size, cpu_s(pid)
        said = len(log_of(self.agent))
        self.bystander.seen()
        began = time.monotonic()
        yield cost
        high = cost.descriptors[1] or descriptors(pid)
        time.sleep(max(0.0, began + LEAST_S - time.monotonic()))  # how long is measured, however short the attack
        cost.seconds = time.monotonic() - began
        cost.cpu_s = cpu_s(pid) - used
        cost.seen = self.bystander.seen()
        cost.peak_mib = resident_mib(pid, "VmHWM")
        cost.audit_kib = (audit.stat().st_size - written) / 1024
        cost.log_kib = (len(log_of(self.agent)) - said) / 1024
        with contextlib.suppress(AssertionError):
            until(lambda: descriptors(pid) <= before * 1.1, "the descriptors are back")
        cost.descriptors = (before, high, descriptors(pid))
        cost.calm_s = self._calm()
        print(cost.line(self.bystander.quiet), flush=True)
        self.verify(cost)

    def _calm(self) -> float:
        """Seconds until the bystander is served as it was while all was quiet, or nearly; 15 at most."""
        began, most_ms = time.monotonic(), max(5 * self.bystander.quiet.kept_p99_ms, 50.0)
        with contextlib.suppress(AssertionError):
            until(lambda: (seen := self._a_few()).asked > 0 and seen.kept_p99_ms < most_ms, "calm", within_s=15)
        return time.monotonic() - began

    def _a_few(self) -> Seen:
        self.bystander.seen()
        time.sleep(0.2)  # how long is measured
        return self.bystander.seen()

    def verify(self, cost: Cost) -> None:
        """What holds after every attack."""
        assert Path(f"/proc/{self.agent.pid}").exists(), log_of(self.agent)[-3000:]
        assert cost.got == 0, "the attacker has a secret that is not its own"
        assert cost.seen.errors == (), "a well-behaved caller met an error"
        assert cost.seen.asked > 0
        before, _, after = cost.descriptors
        assert after <= before * 1.1, "descriptors were left behind"

    def flood(self, name: str, uid: int = STRANGER, *, seconds: float = SECONDS, many: int = CONNECTIONS) -> Cost:
        """Runs one flood of `tests.attacks.attacker` as `uid`, which holds what it opened until that was measured."""
        with self.attacked(name) as cost:
            with Child("tests.attacks.attacker", name, uid, self.target.socket, seconds, many) as attacker:
                assert attacker.line() == "begun"
                cost.tally = attacker.told()
                cost.descriptors = (0, descriptors(self.agent.pid), 0)
            allowed = uid == LOUD  # its own secret is its own
            cost.got = 0 if allowed else cost.tally["got"]
        return cost
