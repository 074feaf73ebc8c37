"""The socket file: who may be replaced, what is refused, and what is left behind."""

import fcntl
import os
import socket
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tokenward.errors import Reason, TokenwardError
from tokenward.serve.listener import Listener, bind


@pytest.fixture
def path(tmp_path: Path) -> str:
    tmp_path.chmod(0o755)
    return str(tmp_path / "agent.sock")


@pytest.fixture
def bound() -> Iterator[Callable[..., Listener]]:
    made: list[Listener] = []

    def bind_it(path: str, **kwargs: int) -> Listener:
        made.append(bind(path, **kwargs))
        return made[-1]

    yield bind_it
    for listener in made:
        listener.close()


def refused(path: str) -> str:
    with pytest.raises(TokenwardError) as caught:
        bind(path)
    assert caught.value.reason is Reason.INVALID_CONFIG
    return caught.value.public


def leave_stale_socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)


def test_it_listens_with_the_mode_that_was_asked_for(path: str, bound: Callable[..., Listener]) -> None:
    listener = bound(path, mode=0o660)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o660
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        listener.socket.accept()[0].close()


def test_it_does_not_survive_an_exec_and_does_not_block(path: str, bound: Callable[..., Listener]) -> None:
    listener = bound(path)
    assert not listener.socket.get_inheritable()
    with pytest.raises(BlockingIOError):
        listener.socket.accept()


def test_the_file_is_never_open_to_others_before_its_mode_is_set(path: str) -> None:
    """Traced from outside: bind, then chmod, under a umask that leaves the owner alone."""
    program = f"""
        import os, sys
        def watch(event, args):
            if event == "os.chmod":
                print(oct(os.stat({path!r}).st_mode & 0o777))
        sys.addaudithook(watch)
        os.umask(0)
        from tokenward.serve.listener import bind
        bind({path!r}, mode=0o666).close()
        print(oct(os.umask(0)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True, timeout=20
    )
    assert done.stdout.split() == ["0o600", "0o0"], "0600 until chmod, and the umask restored"


def test_closing_removes_the_file_and_nothing_else_stays(path: str) -> None:
    bind(path).close()
    assert os.listdir(os.path.dirname(path)) == []


def test_closing_leaves_a_file_that_is_not_ours(path: str) -> None:
    listener = bind(path)
    os.unlink(path)
    leave_stale_socket(path)
    listener.close()
    assert os.path.exists(path)


def test_a_socket_on_which_nobody_listens_is_replaced(path: str, bound: Callable[..., Listener]) -> None:
    leave_stale_socket(path)
    bound(path)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)


def test_a_live_socket_is_an_error_that_names_the_process(path: str) -> None:
    program = (
        f"import socket; s = socket.socket(socket.AF_UNIX); s.bind({path!r}); s.listen(); print(flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert f"process {other.pid} listens" in refused(path)
        assert os.path.exists(path)
        other.communicate("\n", timeout=10)


def test_a_live_socket_with_a_full_backlog_is_live(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        other.listen(0)
        waiting = []
        while True:
            client = socket.socket(socket.AF_UNIX)
            waiting.append(client)
            client.settimeout(0)
            if client.connect_ex(path):
                break
        assert "listens here already" in refused(path)
        for client in waiting:
            client.close()


@pytest.mark.parametrize("make", [lambda p: Path(p).write_text("precious"), os.mkdir, lambda p: os.symlink("/x", p)])
def test_what_is_not_a_socket_is_refused_and_kept(path: str, make: Callable[[str], object]) -> None:
    make(path)
    assert "not a socket" in refused(path)
    assert os.path.lexists(path)


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775])
def test_a_directory_that_others_can_write_is_refused(path: str, mode: int) -> None:
    """The sticky bit does not help: it keeps our file, but lets somebody be there first."""
    os.chmod(os.path.dirname(path), mode)
    assert "chmod go-w" in refused(path)


def test_a_link_as_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o755)
    (tmp_path / "link").symlink_to("real")
    assert "not a link" in refused(str(tmp_path / "link" / "agent.sock"))


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "none") in refused(str(tmp_path / "none" / "agent.sock"))


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a directory to another uid needs root")
def test_a_directory_of_another_user_is_refused(path: str) -> None:
    os.chown(os.path.dirname(path), 4242, -1)
    assert "belongs to uid 4242" in refused(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file to another uid needs root")
def test_owner_and_group_are_set(path: str, bound: Callable[..., Listener]) -> None:
    bound(path, mode=0o660, owner=4242, group=4343)
    found = os.stat(path)
    assert (found.st_uid, found.st_gid) == (4242, 4343)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may give files away")
def test_a_file_that_cannot_be_given_away_is_not_left_behind(path: str) -> None:
    with pytest.raises(TokenwardError):
        bind(path, owner=0)
    assert os.listdir(os.path.dirname(path)) == []


def test_a_path_that_is_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    assert "cannot listen here" in refused(str(tmp_path / ("x" * 120)))
    assert os.listdir(tmp_path) == []


def test_while_another_agent_judges_the_old_socket_it_is_left_alone(path: str) -> None:
    leave_stale_socket(path)
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another agent is starting" in refused(path)
    assert os.path.exists(path)
    bind(path).close()  # a lock file that nobody holds is no obstacle
    assert os.listdir(os.path.dirname(path)) == []


def test_of_many_agents_that_start_at_once_one_gets_the_socket(path: str) -> None:
    """All find the same stale file; whoever says it listens must be reachable at the path."""
    program = f"""
        import sys
        from tokenward.errors import TokenwardError
        from tokenward.serve.listener import bind
        print(flush=True); input()
        try:
            listener = bind({path!r})
        except TokenwardError as error:
            print(error.public, flush=True)
        else:
            print("listening", flush=True)
        input()
    """
    leave_stale_socket(path)
    for _ in range(3):  # what the killed ones leave is stale again
        agents = [
            subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(program)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(6)
        ]
        try:
            for agent in agents:
                assert agent.stdout is not None
                agent.stdout.readline()
            for agent in agents:
                assert agent.stdin is not None
                agent.stdin.write("\n")
                agent.stdin.flush()
            said = [agent.stdout.readline().strip() for agent in agents if agent.stdout is not None]
            assert said.count("listening") == 1, said
            assert f"process {agents[said.index('listening')].pid} listens" in refused(path)
        finally:
            for agent in agents:
                agent.kill()
                agent.communicate(timeout=10)


# -- systemd ----------------------------------------------------------------------------------------------------------

TAKE = """
    import os, sys
    from tokenward.errors import TokenwardError
    from tokenward.serve.listener import from_systemd
    if "no-pid" not in sys.argv:
        os.environ["LISTEN_PID"] = str(os.getpid())
    for name in sys.argv[1:]:
        try:
            taken = from_systemd(None if name == "-" else name)
        except TokenwardError as error:
            print(error.public)
        else:
            print(taken and (taken.path, taken.socket.get_inheritable(), taken.socket.gettimeout()))
            if taken:
                taken.close()
    print([name for name in os.environ if name.startswith("LISTEN")])
"""


def take(sockets: list[socket.socket], names: str, *asked: str) -> list[str]:
    """What a process says that got `sockets` from descriptor 3 on, as systemd passes them."""
    moves = "; ".join(f"os.dup2({sock.fileno()}, {3 + at})" for at, sock in enumerate(sockets))
    starter = f"import os, sys; {moves or 'pass'}; os.execv(sys.executable, [sys.executable, '-c', *sys.argv[1:]])"
    environment = {**os.environ, "LISTEN_FDS": str(len(sockets)), "LISTEN_FDNAMES": names, "LISTEN_PID": "1"}
    done = subprocess.run(
        [sys.executable, "-c", starter, textwrap.dedent(TAKE), *asked],
        env=environment,
        pass_fds=[sock.fileno() for sock in sockets],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert not done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def passed(tmp_path: Path) -> Iterator[Callable[..., socket.socket]]:
    made = []

    def listen(name: str, *, kind: socket.SocketKind = socket.SOCK_STREAM, backlog: int | None = 5) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, kind)
        # Far from 3: dup2 to the descriptors that systemd uses must not close another one of ours.
        high = socket.socket(fileno=fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD_CLOEXEC, 100))
        sock.close()
        high.bind(str(tmp_path / name))
        if backlog is not None:
            high.listen(backlog)
        made.append(high)
        return high

    yield listen
    for sock in made:
        sock.close()


def test_a_passed_socket_is_taken_and_its_file_stays(passed: Callable[..., socket.socket], tmp_path: Path) -> None:
    said = take([passed("a.sock")], "workload", "workload", "workload")
    assert said == [f"('{tmp_path}/a.sock', False, 0.0)", "None", "[]"]
    assert (tmp_path / "a.sock").exists()


def test_the_only_one_needs_no_name(passed: Callable[..., socket.socket], tmp_path: Path) -> None:
    assert take([passed("a.sock")], "tokenward.socket", "-")[0].startswith(f"('{tmp_path}/a.sock'")


def test_several_are_told_apart_by_name(passed: Callable[..., socket.socket], tmp_path: Path) -> None:
    said = take([passed("a.sock"), passed("b.sock")], "workload:admin", "-", "admin", "workload", "other")
    assert "name one of admin, workload" in said[0]
    assert said[1].startswith(f"('{tmp_path}/b.sock'")
    assert said[2].startswith(f"('{tmp_path}/a.sock'")
    assert said[3:] == ["None", "[]"]


def test_sockets_for_another_process_are_not_ours(passed: Callable[..., socket.socket]) -> None:
    assert take([passed("a.sock")], "workload", "workload", "no-pid") == ["None", "None", "[]"]


def test_none_passed_is_none() -> None:
    assert take([], "", "-") == ["None", "[]"]


def test_what_does_not_listen_or_is_no_stream_is_refused(passed: Callable[..., socket.socket]) -> None:
    datagram = passed("d.sock", kind=socket.SOCK_DGRAM, backlog=None)
    said = take([passed("a.sock", backlog=None), datagram], "silent:datagram", "silent", "datagram")
    assert all("does not listen" in line for line in said[:2])
