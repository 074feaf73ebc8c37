"""podman and buildah as they run without a systemd and without the right to raise limits, and the image built by them.

The base image is made from the mirror of the machine's own apt, since there may be no registry: a Debian with Python.
Packages come from a wheelhouse that pip fills by the lock, so that the build itself needs no network.
"""

from __future__ import annotations

import json
import os
import resource
import secrets
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.containers.manifests import ROOT

_PROGRAMS = ("podman", "buildah", "runc", "conmon", "mmdebstrap")
_MINUTES_S = 600.0


def missing() -> str:
    """What keeps containers from being built and run here, or nothing."""
    if os.geteuid() != 0:
        return "building and running containers needs root"
    lacking = [program for program in _PROGRAMS if shutil.which(program) is None]
    if lacking:
        return f"no {', '.join(lacking)}: apt-get install --no-install-recommends podman buildah runc mmdebstrap"
    return "" if _mirror() else "apt knows no mirror of Debian to make a base image from: apt-get update"


def _mirror() -> str:
    """Where the machine's apt gets Debian itself from; nothing where it has not looked yet, or is of something else."""
    if shutil.which("apt-get") is None:
        return ""
    wanted = ("Identifier: Packages", "Origin: Debian", "Label: Debian", "Component: main")
    asked = ["apt-get", "indextargets", "--format", "$(REPO_URI)", *wanted]
    return next(iter(subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()), "")


class Engine:
    """Containers with a store of their own below `directory`; `close` removes all of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.image = f"localhost/tokenward-{secrets.token_hex(4)}"
        settings = directory / "containers.conf"
        files, processes = (resource.getrlimit(which)[1] for which in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC))
        limits = [f"nofile={_within(files, 20000)}", f"nproc={_within(processes, 32768)}"]
        settings.write_text(
            f'[containers]\ndefault_ulimits = {json.dumps(limits)}\nnetns = "host"\nlog_driver = "k8s-file"\n'
            '[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n'
        )
        storage = directory / "storage.conf"
        storage.write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{directory}/store"\nrunroot = "{directory}/run"\n'
        )
        self._environment = {
            **os.environ,
            "CONTAINERS_CONF": str(settings),
            "CONTAINERS_STORAGE_CONF": str(storage),
            "TMPDIR": str(directory),
        }

    def run(self, *command: str, check: bool = True, given: str = "") -> subprocess.CompletedProcess[str]:
        """A command to its end."""
        done = subprocess.run(
            command,
            input=given,
            capture_output=True,
            text=True,
            check=False,
            timeout=_MINUTES_S,
            env=self._environment,
            cwd=self.directory,
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}{done.stdout}"
        return done

    def podman(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run("podman", *arguments, check=check)

    def once(self, *command: str, options: Sequence[str] = ()) -> str:
        """What a command of the image prints, run as a pod runs it: nothing can be written, nothing is allowed."""
        closed = ("--read-only", "--cap-drop=all", "--security-opt=no-new-privileges", "--no-healthcheck", "--rm")
        entry = ("--entrypoint", json.dumps(list(command)))
        return self.podman("run", "--pull=never", *closed, *options, *entry, self.image).stdout

    def inspect(self, what: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.podman("inspect", what).stdout)[0]
        return found

    def build(self) -> None:
        """The image, from the Dockerfile as it is."""
        base, wheels = f"{self.image}-base", self.directory / "wheels"
        locks = [f"--requirement={ROOT}/.docker/{name}.lock" for name in ("requirements", "build")]
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--require-hashes", "--only-binary=:all:"]
        # For the Python of the base image, which need not be the one that runs the tests.
        download += ["--python-version=3.11", "--implementation=cp", f"--dest={wheels}"]
        filling = subprocess.Popen([*download, *locks], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            self._make_base(base)
        finally:
            said, _ = filling.communicate(timeout=_MINUTES_S)
        assert filling.returncode == 0, said
        offline = {"BASE": base, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/wheels"}
        arguments = [f"--build-arg={key}={value}" for key, value in offline.items()]
        options = ("--isolation=chroot", "--pull-never", "--format=docker", f"--volume={wheels}:/wheels:ro")
        self.run("buildah", "bud", "--quiet", *options, *arguments, f"--tag={self.image}", str(ROOT))

    def _make_base(self, name: str) -> None:
        made = self.directory / "base.tar"
        left_out = [f"--dpkgopt=path-exclude=/usr/share/{each}/*" for each in ("man", "doc", "locale", "zoneinfo")]
        self.run(
            "mmdebstrap",
            "--quiet",
            "--mode=root",
            "--variant=essential",
            "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
            "--include=usr-is-merged,python3-venv,ca-certificates,libstdc++6",
            '--aptopt=APT::Install-Recommends "false"',
            *left_out,
            "bookworm",
            str(made),
            _mirror(),
        )
        self.podman("import", "--quiet", str(made), name)
        made.unlink()

    def close(self) -> None:
        """Ends and removes everything that was made."""
        self.podman("pod", "rm", "--all", "--force", "--time=0", check=False)
        self.podman("rm", "--all", "--force", "--time=0", check=False)
        self.podman("rmi", "--all", "--force", check=False)
        shutil.rmtree(self.directory / "store", ignore_errors=True)


def _within(limit: int, most: int) -> str:
    """podman asks for more than it may have unless it is told; below the hard limit it may be any number."""
    allowed = most if limit == resource.RLIM_INFINITY else min(limit, most)
    return f"{allowed}:{allowed}"
