"""The process at the other end of a socket: real sockets, real processes."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tokenward.attest.peer import Peer, peer_of, pidfd_of_pid
from tokenward.errors import AttestationError, DeniedError, Reason

_CONNECT = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); "
_both_ways = pytest.mark.parametrize("ask_peerpidfd", [True, False], ids=["SO_PEERPIDFD", "pidfd_open"])


@contextmanager
def connected(directory: Path, then: str) -> Iterator[tuple[socket.socket, subprocess.Popen[bytes]]]:
    """Our end of a connection that a child made, which then runs `then`; accepted not before the child wrote a line."""
    path = str(directory / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        command = [sys.executable, "-c", _CONNECT + "print(flush=True); " + then, path]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.readline()
            with listener.accept()[0] as accepted:
                yield accepted, child
            child.kill()


@pytest.fixture
def own() -> Iterator[Peer]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        peer = peer_of(ours)
        yield peer
        peer.close()


def test_the_kernel_names_pid_ids_and_groups(own: Peer) -> None:
    assert (own.pid, own.uid, own.gid) == (os.getpid(), os.geteuid(), os.getegid())
    assert sorted(own.groups) == sorted(os.getgroups())
    assert own.start_time is None
    assert own.is_alive()


def test_a_closed_peer_is_not_alive_and_closing_twice_closes_nothing_else(own: Peer) -> None:
    number = own.pidfd
    own.close()
    assert not own.is_alive()
    reader, writer = os.pipe()
    try:
        assert number in {reader, writer}  # the number is in use again
        own.close()
        os.write(writer, b"x")
        assert os.read(reader, 1) == b"x"
    finally:
        os.close(reader)
        os.close(writer)


def test_the_pidfd_is_not_inherited_by_children(own: Peer) -> None:
    assert not os.get_inheritable(own.pidfd)


@_both_ways
def test_a_process_that_ends_is_not_alive_even_before_it_is_reaped(ask_peerpidfd: bool, tmp_path: Path) -> None:
    with connected(tmp_path, "sys.stdin.read()") as (sock, child):
        peer = peer_of(sock, ask_peerpidfd=ask_peerpidfd)
        assert peer.pid == child.pid
        assert peer.is_alive()
        child.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not peer.is_alive()
        child.wait()
        assert not peer.is_alive()
        peer.close()


@_both_ways
@pytest.mark.parametrize("reaped", [True, False], ids=["reaped", "zombie"])
def test_a_process_that_ended_before_we_accepted_is_refused(ask_peerpidfd: bool, reaped: bool, tmp_path: Path) -> None:
    with connected(tmp_path, "") as (sock, child):
        os.waitid(os.P_PID, child.pid, os.WEXITED | (0 if reaped else os.WNOWAIT))
        before = os.listdir("/proc/self/fd")
        with pytest.raises(DeniedError) as caught:
            peer_of(sock, ask_peerpidfd=ask_peerpidfd)
        assert caught.value.reason is Reason.PEER_GONE
        assert os.listdir("/proc/self/fd") == before


@_both_ways
def test_the_kernels_word_comes_from_the_connection_not_from_its_user(ask_peerpidfd: bool, tmp_path: Path) -> None:
    """A child speaks on the socket that its parent connected: the peer is the parent, until that ends."""
    speak = "import os; pid = os.fork(); pid or (s.send(b'x'), sys.stdin.read(), os._exit(0)); sys.stdin.read(1)"
    with connected(tmp_path, speak) as (sock, child):
        peer = peer_of(sock, ask_peerpidfd=ask_peerpidfd)
        assert sock.recv(1) == b"x"
        assert peer.pid == child.pid
        assert peer.is_alive()
        child.kill()
        child.wait()
        assert not peer.is_alive()
        assert child.stdin is not None
        child.stdin.close()
        assert sock.recv(1) == b""  # the one that spoke was alive until now
        peer.close()


def test_without_pidfds_of_peers_the_start_time_is_a_second_witness(tmp_path: Path) -> None:
    with connected(tmp_path, "sys.stdin.read()") as (sock, _):
        peer = peer_of(sock, ask_peerpidfd=False)
        assert peer.start_time is not None
        assert peer.is_alive()
        object.__setattr__(peer, "start_time", peer.start_time - 1)
        assert not peer.is_alive()
        peer.close()


def test_a_pid_that_belongs_to_another_uid_by_now_is_not_the_peer() -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(DeniedError) as caught:
        pidfd_of_pid(os.getpid(), os.geteuid() + 1)
    assert caught.value.reason is Reason.PEER_GONE
    assert os.listdir("/proc/self/fd") == before


def test_a_pid_that_nobody_has_is_gone() -> None:
    with pytest.raises(DeniedError) as caught:
        pidfd_of_pid(int(Path("/proc/sys/kernel/pid_max").read_text()), 0)
    assert caught.value.reason is Reason.PEER_GONE


def test_an_unknown_pid_cannot_be_followed_by_number() -> None:
    with pytest.raises(AttestationError, match="another pid namespace"):
        pidfd_of_pid(0, 0)


def test_a_socket_that_is_not_connected_has_no_peer() -> None:
    with socket.socket(socket.AF_UNIX) as sock, pytest.raises(DeniedError) as caught:
        peer_of(sock)
    assert caught.value.reason is Reason.UNKNOWN_PEER


def test_a_closed_socket_has_no_peer() -> None:
    sock = socket.socket(socket.AF_UNIX)
    sock.close()
    with pytest.raises(AttestationError, match="did not tell"):
        peer_of(sock)


@contextmanager
def _descriptors_left(count: int) -> Iterator[None]:
    """Lets us open `count` more descriptors and no others, and sees that none stays open."""
    before = os.listdir("/proc/self/fd")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    next_numbers = [os.dup(0) for _ in range(count + 1)]
    for number in next_numbers:
        os.close(number)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(next_numbers), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert os.listdir("/proc/self/fd") == before


@_both_ways
def test_without_a_free_descriptor_we_could_not_tell(ask_peerpidfd: bool) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, _descriptors_left(0), pytest.raises(AttestationError, match="cannot be followed"):
        peer_of(ours, ask_peerpidfd=ask_peerpidfd)


def test_a_failure_after_the_pidfd_was_opened_closes_it() -> None:
    """One descriptor is left: enough for the pidfd, not for reading the start time."""
    with _descriptors_left(1), pytest.raises(AttestationError, match="/proc/"):
        pidfd_of_pid(os.getpid(), os.geteuid())


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: only root can give a process supplementary groups")
@pytest.mark.parametrize("count", [0, 1, 256, 257, 5000])
def test_any_number_of_supplementary_groups_is_read(count: int, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    groups = list(range(20_000, 20_000 + count))
    become = f"import os; os.setgroups(range(20000, {20_000 + count})); "
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with subprocess.Popen([sys.executable, "-c", become + _CONNECT + "s.recv(1)", path]):
            with listener.accept()[0] as accepted:
                peer = peer_of(accepted)
            assert list(peer.groups) == groups
            peer.close()
