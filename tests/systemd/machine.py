"""A machine with a systemd of its own, for tests: the host's /usr, everything else new.

Boots systemd-nspawn in 0.3 s on a directory that has an /etc of ours and the host's /usr, read-only; no image is made
or fetched. The interpreter that runs the tests, its packages and tokenward are mounted read-only below /opt: the agent
runs from there, unless the machine is booted bare, to install it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import tokenward

ROOT = Path(__file__).resolve().parents[2]
UNITS = ROOT / "systemd"
AGENT_UID, APP_UID, OTHER_UID = 990, 1001, 1002
_UP_S = 60.0

_PASSWD = f"""\
root:x:0:0:root:/root:/bin/sh
messagebus:x:980:980::/nonexistent:/usr/sbin/nologin
app:x:{APP_UID}:{APP_UID}::/nonexistent:/usr/sbin/nologin
other:x:{OTHER_UID}:{OTHER_UID}::/nonexistent:/usr/sbin/nologin
nobody:x:65534:65534::/nonexistent:/usr/sbin/nologin
"""
_GROUP = f"root:x:0:\nmessagebus:x:980:\napp:x:{APP_UID}:\nother:x:{OTHER_UID}:\nnogroup:x:65534:\n"
_AGENT = f"tokenward:x:{AGENT_UID}:{AGENT_UID}::/nonexistent:/usr/sbin/nologin\n"
_AGENT_GROUPS = f"tokenward:x:{AGENT_UID}:\ntokenward-admin:x:{AGENT_UID + 1}:\n"
_RUN = """\
#!/bin/sh
export LD_LIBRARY_PATH=/opt/python/lib PYTHONHOME=/opt/python PYTHONPATH=/opt/agent:/opt/packages
export PYTHONDONTWRITEBYTECODE=1
exec /opt/python/bin/python{version} {arguments} "$@"
"""
# Joins cgroups of its own, since two nspawn would share one, and becomes nspawn.
_BOOT = 'for cgroup; do [ "$cgroup" = -- ] && shift && break; echo $$ >"$cgroup/cgroup.procs"; shift; done; exec "$@"'


def missing() -> str:
    """What keeps a machine from being booted here, or nothing."""
    if os.geteuid() != 0:
        return "booting a systemd needs root"
    programs = ("systemd-nspawn", "nsenter", "setpriv", "dbus-daemon", "/usr/lib/systemd/systemd")
    lacking = [program for program in programs if shutil.which(program) is None]
    if lacking:
        return f"no {', '.join(lacking)}: apt-get install systemd systemd-container dbus"
    return "" if Path("/bin").is_symlink() else "the host's programs are not all in /usr"


def until(holds: Callable[[], object], what: Callable[[], str] = lambda: "it did not happen") -> None:
    """Returns when `holds` does."""
    give_up = time.monotonic() + _UP_S
    while not holds():
        assert time.monotonic() < give_up, what()
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    """The processes that `pid` started and that are still there. The child of a `start_app` is the app itself."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class Machine:
    """Booted within the block. `etc` adds files by their path below /etc, `shared` directories by where they appear.

    A `bare` one knows nothing of tokenward: it has the units where a checkout would be, in /root/tokenward.
    """

    def __init__(self, *, etc: Mapping[str, str], shared: Mapping[str, Path], bare: bool = False) -> None:
        self.directory = Path(tempfile.gettempdir(), f"tokenward-{secrets.token_hex(8)}")  # a machine's name, too
        self.directory.mkdir()
        self.root = self.directory / "root"
        """All that the machine can write to a disk."""
        self._shared = shared
        self._bare = bare
        self._cgroups = [path / self.directory.name for path in _hierarchies()]
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._init = 0
        self._fill(etc)

    def __enter__(self) -> Self:
        try:
            self._boot()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- what is done in it -------------------------------------------------------------------------------------------

    def run(self, *command: str, given: str = "", check: bool = True) -> str:
        """Runs a command as root, with `given` on its stdin; returns what it printed."""
        done = subprocess.run(
            [*self._inside(), *command], input=given, capture_output=True, text=True, check=False, timeout=_UP_S
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}{done.stdout}\n{self.journal()}"
        return done.stdout

    def run_shell(self, script: str, *, given: str = "") -> str:
        """Runs a shell script as a login of root would, in /root/tokenward; returns what it printed."""
        path = "PATH=/opt/python/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        login = ("env", "-i", "--chdir=/root/tokenward", path, "HOME=/root")
        return self.run(*login, "sh", "-eu", "-c", script, given=given)

    def start_app(self, program: str) -> subprocess.Popen[str]:
        """A Python program of the user `app`, with tokenward to import."""
        user = ("setpriv", f"--reuid={APP_UID}", f"--regid={APP_UID}", "--clear-groups")
        return subprocess.Popen(
            [*self._inside(), *user, "/usr/local/bin/interpreter", "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def start_unit(self, program: str, *, uid: int = APP_UID) -> subprocess.Popen[str]:
        """The same as a unit of systemd's: other processes that are started from outside are in none."""
        run = ("systemd-run", "--quiet", "--pipe", "--wait", "--collect", f"--uid={uid}", f"--gid={uid}")
        return subprocess.Popen(
            [*self._inside(), *run, "/usr/local/bin/interpreter", "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def show(self, unit: str, name: str) -> str:
        """One property of a unit."""
        return self.run("systemctl", "show", f"--property={name}", "--value", unit).strip()

    def journal(self) -> str:
        """What the services said."""
        command = [*self._inside(), "journalctl", "--no-pager", "--output=cat"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout

    def files_with(self, secret: bytes) -> list[str]:
        """Every file that the machine could write, on disk or in memory, with `secret` in it."""
        seen = Path(f"/proc/{self._init}/root")
        places = [self.root, *(seen / name for name in ("run", "tmp", "dev/shm"))]
        return [str(path) for place in places for path in _files(place) if secret in _content(path)]

    # -- within -------------------------------------------------------------------------------------------------------

    def _inside(self) -> tuple[str, ...]:
        return ("nsenter", "-t", str(self._init), "-a")

    def _fill(self, etc: Mapping[str, str]) -> None:
        for name in ("dev", "etc/systemd/system", "opt", "proc", "root", "run", "sys", "tmp", "usr", "var"):
            (self.root / name).mkdir(parents=True)
        for name in ("bin", "lib", "lib64", "sbin"):
            if Path("/", name).is_symlink():
                (self.root / name).symlink_to(f"usr/{name}")
        shutil.copytree(UNITS, self.root / "root/tokenward/systemd")
        own = {"passwd": _PASSWD, "group": _GROUP, "machine-id": os.urandom(16).hex() + "\n"}
        if not self._bare:
            own |= {"passwd": _PASSWD + _AGENT, "group": _GROUP + _AGENT_GROUPS}
            for unit in (path for path in UNITS.iterdir() if path.is_file()):
                shutil.copy(unit, self.root / "etc/systemd/system")
        for name, text in {**own, "os-release": "ID=test\n", **etc}.items():
            path = self.root / "etc" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        programs = self.directory / "local/bin"
        programs.mkdir(parents=True)
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        wrapped = {"interpreter": ""} if self._bare else {"interpreter": "", "tokenward": "-m tokenward.cli"}
        for name, arguments in wrapped.items():
            (programs / name).write_text(_RUN.format(version=version, arguments=arguments))
            (programs / name).chmod(0o755)
        for path in (self.directory, self.root, self.directory / "local", programs):
            path.chmod(0o755)

    def _boot(self) -> None:
        mounted = {
            "/usr": Path("/usr"),
            "/opt/python": Path(sys.base_prefix),
            "/opt/packages": Path(sysconfig.get_path("purelib")),
            "/opt/agent": Path(tokenward.__file__).parents[1],
        }
        for cgroup in self._cgroups:
            cgroup.mkdir()
        command = [
            "systemd-nspawn",
            "--quiet",
            "--register=no",
            "--keep-unit",
            "--settings=no",
            "--private-network",
            "--resolv-conf=off",
            "--timezone=off",
            "--link-journal=no",
            "--console=pipe",
            f"--machine={self.directory.name}",
            f"--directory={self.root}",
            *(f"--bind-ro={source}:{target}" for target, source in mounted.items()),
            f"--bind={self.directory / 'local'}:/usr/local",
            *(f"--bind={source}:{target}" for target, source in self._shared.items()),
            "--boot",
        ]
        with (self.directory / "console").open("wb") as console:
            self._nspawn = subprocess.Popen(
                ["sh", "-c", _BOOT, "sh", *map(str, self._cgroups), "--", *command],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )
        until(self._is_up, lambda: (self.directory / "console").read_text(errors="replace"))

    def _is_up(self) -> bool:
        assert self._nspawn is not None
        assert self._nspawn.poll() is None, (self.directory / "console").read_text(errors="replace")
        found = children(self._nspawn.pid)
        if not found:
            return False
        self._init = found[0]
        asked = [*self._inside(), "systemctl", "is-system-running"]
        state = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
        return state in {"running", "degraded"}

    def close(self) -> None:
        """Ends it at once and removes what was made for it."""
        if self._nspawn is not None:
            if self._init and self._nspawn.poll() is None:
                os.kill(self._init, signal.SIGKILL)  # the end of its first process ends all of them
            try:
                self._nspawn.wait(10)
            except subprocess.TimeoutExpired:
                self._nspawn.kill()
                self._nspawn.wait()
        for cgroup in self._cgroups:
            for directory, _, _ in os.walk(cgroup, topdown=False):
                until(lambda path=directory: _is_removed(path))  # type: ignore[misc]  # the kernel takes a moment
        shutil.rmtree(self.directory)


def _hierarchies() -> list[Path]:
    """Where systemd keeps track of processes: in one cgroup hierarchy, or on older machines in two."""
    found = [path for path in (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup/systemd")) if path.is_dir()]
    return found or [Path("/sys/fs/cgroup")]


def _is_removed(cgroup: str) -> bool:
    try:
        os.rmdir(cgroup)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file() and not path.is_symlink()]


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:  # removed since it was listed
        return b""
