"""Which socket is chosen, and what is said of one that does not answer."""

import os
import socket
from pathlib import Path

import pytest

from tokenward import InvalidRequestError, Reason
from tokenward.client.address import SYSTEM_SOCKET, VARIABLE, is_private, socket_path, unreachable

as_other_user = pytest.mark.skipif(os.geteuid() == 0, reason="root may open every file")


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.mark.parametrize("written", ["/run/x/a.sock", "unix:/run/x/a.sock", "unix:///run/x/a.sock"])
def test_a_path_may_be_written_plain_or_as_a_unix_address(written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert socket_path(written) == "/run/x/a.sock"
    monkeypatch.setenv(VARIABLE, written)
    assert socket_path() == "/run/x/a.sock"


def test_the_argument_comes_before_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "/run/variable.sock")
    assert socket_path("/run/argument.sock") == "/run/argument.sock"


def test_a_relative_path_is_meant_from_where_the_process_is_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert socket_path("a.sock") == str(tmp_path / "a.sock")


@pytest.mark.skipif(os.path.exists(SYSTEM_SOCKET), reason="a system agent runs here and comes first")
def test_without_any_agent_the_system_socket_is_named() -> None:
    if os.path.exists(f"/tmp/tokenward-dev-{os.getuid()}/workload.sock"):
        pytest.skip("a `tokenward dev` of this user runs here and comes first")
    assert socket_path() == SYSTEM_SOCKET


def test_an_empty_variable_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = socket_path()
    monkeypatch.setenv(VARIABLE, "")
    assert socket_path() == chosen


@pytest.mark.parametrize("wrong", ["", "unix:", "http://localhost:80", "tcp://x", "/a\0b", "/" + "x" * 107])
def test_what_cannot_be_a_socket_is_refused_with_its_source_named(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequestError, match="the socket"):
        socket_path(wrong)


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "https://vault.example")
    with pytest.raises(InvalidRequestError, match=VARIABLE):
        socket_path()


@pytest.mark.parametrize(("mode", "private"), [(0o700, True), (0o755, True), (0o720, False), (0o1777, False)])
def test_a_directory_that_others_can_write_is_not_private(tmp_path: Path, mode: int, private: bool) -> None:
    tmp_path.chmod(mode)
    assert is_private(str(tmp_path)) is private


def test_a_link_to_a_private_directory_is_not_private(tmp_path: Path) -> None:
    """Somebody else could have made it, and could point it elsewhere later."""
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert not is_private(str(tmp_path / "link"))
    assert not is_private(str(tmp_path / "nothing"))


def test_a_directory_of_another_user_is_not_private() -> None:
    foreign = "/proc/1" if os.getuid() != 0 else None
    if foreign is None:
        pytest.skip("root owns what could be looked at here")
    assert not is_private(foreign)


def test_each_way_of_not_answering_has_its_own_advice(tmp_path: Path) -> None:
    path = str(tmp_path / "a.sock")
    texts = []

    def advice() -> str:
        error = unreachable(path)
        assert error is not None
        assert error.reason is Reason.AGENT_UNREACHABLE
        assert path in error.public
        texts.append(error.public)
        return error.public

    assert "start the agent" in advice()
    (tmp_path / "a.sock").write_text("")
    assert "not a socket" in advice()
    (tmp_path / "a.sock").unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        assert "has stopped" in advice()
        listener.listen(0)
        assert unreachable(path) is None
        with socket.socket(socket.AF_UNIX) as waiting:
            waiting.setblocking(False)
            waiting.connect_ex(path)
            assert "overloaded" in advice()
    assert len(set(texts)) == len(texts)


@as_other_user
def test_a_socket_that_may_not_be_opened_says_who_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "a.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        os.chmod(path, 0)
        error = unreachable(path)
    assert error is not None
    assert f"uid {os.geteuid()}" in error.public
