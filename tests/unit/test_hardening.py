"""What the agent refuses to start with: files that others could change or read, and switches that show memory."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tokenward import logs
from tokenward.errors import Reason, TokenwardError
from tokenward.hardening import flaw_of, verify_switches

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="giving a file to another uid needs root")
OTHER = 65531


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory of ours that others can enter, in /tmp, where anybody may make files."""
    with tempfile.TemporaryDirectory(prefix="tw-hard-") as made:
        Path(made).chmod(0o755)
        yield Path(made)


def file_in(directory: Path, *, mode: int = 0o644) -> Path:
    file = directory / "file"
    file.write_text("x")
    file.chmod(mode)
    return file


def directory_in(directory: Path, name: str, *, mode: int = 0o755) -> Path:
    made = directory / name
    made.mkdir()
    made.chmod(mode)
    return made


# -- who may change it ------------------------------------------------------------------------------------------------


def test_a_file_that_we_alone_may_write_is_ours(place: Path) -> None:
    assert flaw_of(str(file_in(place))) is None


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_a_file_that_others_may_write_is_not(place: Path, mode: int) -> None:
    flaw = flaw_of(str(file_in(place, mode=mode)))
    assert flaw is not None
    assert flaw.place == str(place / "file")
    assert f"{mode:04o}" in flaw.why
    assert "chmod go-w" in flaw.why


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777])
def test_nor_one_below_a_directory_that_others_may_write(place: Path, mode: int) -> None:
    """They could put another file in its place, or another directory in its parent's."""
    upper = directory_in(place, "upper", mode=mode)
    flaw = flaw_of(str(file_in(directory_in(upper, "lower"))))
    assert flaw is not None
    assert flaw.place == str(upper)


def test_a_sticky_directory_may_be_on_the_way(place: Path) -> None:
    shared = directory_in(place, "shared", mode=0o1777)
    assert flaw_of(str(file_in(shared))) is None
    assert flaw_of(str(file_in(directory_in(shared, "own")))) is None


def test_a_sticky_directory_is_not_one_to_take_all_files_of(place: Path) -> None:
    shared = directory_in(place, "conf.d", mode=0o1777)
    flaw = flaw_of(str(shared))
    assert flaw is not None
    assert flaw.place == str(shared)
    assert flaw_of(str(directory_in(place, "own"))) is None


@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_what_others_could_make_first_is_not_ours_though_it_is_not_there(place: Path, mode: int) -> None:
    shared = directory_in(place, "shared", mode=mode)
    flaw = flaw_of(str(shared / "missing"))
    assert flaw is not None
    assert flaw.place == str(shared)


def test_what_is_not_there_in_a_directory_of_ours_is_left_to_who_opens_it(place: Path) -> None:
    assert flaw_of(str(place / "missing" / "file")) is None


@needs_root
def test_the_owner_may_change_it_whatever_its_mode(place: Path) -> None:
    file = file_in(place, mode=0o400)
    os.chown(file, OTHER, 0)
    flaw = flaw_of(str(file))
    assert flaw is not None
    assert f"uid {OTHER}" in flaw.why
    assert "chown" in flaw.why


@needs_root
def test_a_sticky_directory_of_another_user_is_his(place: Path) -> None:
    shared = directory_in(place, "shared", mode=0o1777)
    os.chown(shared, OTHER, 0)
    flaw = flaw_of(str(file_in(shared)))
    assert flaw is not None
    assert flaw.place == str(shared)


# -- links ----------------------------------------------------------------------------------------------------------


def test_a_link_is_as_safe_as_where_it_leads(place: Path) -> None:
    bad = directory_in(place, "open", mode=0o777)
    file_in(bad)
    good = directory_in(place, "own")
    file_in(good)
    links = directory_in(place, "links")
    for name, target in {
        "absolute": str(bad / "file"),
        "relative": "../open/file",
        "of the directory": "../open",
        "two": "absolute",
    }.items():
        (links / name).symlink_to(target)
        path = links / name / "file" if name == "of the directory" else links / name
        flaw = flaw_of(str(path))
        assert flaw is not None, name
        assert flaw.place == str(bad), name
    (links / "good").symlink_to("../own/file")
    assert flaw_of(str(links / "good")) is None


def test_a_link_that_others_could_replace_is_not_ours(place: Path) -> None:
    shared = directory_in(place, "open", mode=0o777)
    (shared / "link").symlink_to(file_in(place))
    flaw = flaw_of(str(shared / "link"))
    assert flaw is not None
    assert flaw.place == str(shared)


@needs_root
def test_nor_is_one_that_another_user_made_in_a_sticky_directory(place: Path) -> None:
    shared = directory_in(place, "shared", mode=0o1777)
    link = shared / "link"
    link.symlink_to(file_in(place))
    os.chown(link, OTHER, OTHER, follow_symlinks=False)
    flaw = flaw_of(str(link))
    assert flaw is not None
    assert flaw.place == str(link)


def test_a_dangling_link_is_as_safe_as_where_its_target_would_be(place: Path) -> None:
    shared = directory_in(place, "shared", mode=0o1777)
    (shared / "link").symlink_to("missing")
    (place / "link").symlink_to("missing")
    flaw = flaw_of(str(shared / "link"))
    assert flaw is not None
    assert flaw.place == str(shared)
    assert flaw_of(str(place / "link")) is None


def test_links_in_a_circle_end(place: Path) -> None:
    (place / "a").symlink_to("b")
    (place / "b").symlink_to("a")
    assert flaw_of(str(place / "a")) is None


def test_dots_are_followed_as_the_kernel_follows_them(place: Path) -> None:
    """`link/..` is the parent of where the link leads, not of the link."""
    bad = directory_in(place, "open", mode=0o777)
    directory_in(bad, "deep")
    file_in(bad)
    links = directory_in(place, "links")
    (links / "deep").symlink_to("../open/deep")
    flaw = flaw_of(f"{links}/deep/../file")
    assert flaw is not None
    assert flaw.place == str(bad)
    assert flaw_of(f"{place}/./links//../links") is None


def test_a_relative_path_begins_where_we_are(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = directory_in(place, "open", mode=0o777)
    file_in(bad)
    monkeypatch.chdir(bad)
    flaw = flaw_of("file")
    assert flaw is not None
    assert flaw.place == str(bad)


# -- who may read it --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o440])
def test_a_key_for_us_and_a_group_of_ours_is_secret(place: Path, mode: int) -> None:
    assert flaw_of(str(file_in(place, mode=mode)), is_secret=True) is None


def test_a_key_that_anybody_may_read_is_not(place: Path) -> None:
    flaw = flaw_of(str(file_in(place, mode=0o604)), is_secret=True)
    assert flaw is not None
    assert "chmod go-r" in flaw.why
    assert flaw_of(str(place / "file")) is None


@needs_root
def test_nor_is_one_that_a_group_of_others_may_read(place: Path) -> None:
    file = file_in(place, mode=0o640)
    os.chown(file, 0, OTHER)
    assert flaw_of(str(file), is_secret=True) is not None


def test_a_directory_that_others_cannot_enter_keeps_what_is_in_it(place: Path) -> None:
    """`openssl` and editors make files of mode 0644; the directory is what protects them then."""
    closed = directory_in(place, "closed", mode=0o700)
    file = file_in(directory_in(closed, "open"), mode=0o644)
    assert flaw_of(str(file), is_secret=True) is None
    closed.chmod(0o701)
    assert flaw_of(str(file), is_secret=True) is not None


def test_a_link_in_a_closed_directory_hides_nothing(place: Path) -> None:
    link = directory_in(place, "closed", mode=0o700) / "link"
    link.symlink_to(file_in(place, mode=0o644))
    assert flaw_of(str(link), is_secret=True) is not None


# -- switches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PYTHONINSPECT", "1"),
        ("PYTHONASYNCIODEBUG", "1"),
        ("GRPC_TRACE", "http"),
        ("GRPC_TRACE", "api,tcp"),
        ("GRPC_VERBOSITY", "DEBUG"),
    ],
)
def test_a_switch_that_shows_memory_is_refused_by_its_name(name: str, value: str) -> None:
    with pytest.raises(TokenwardError, match=name) as caught:
        verify_switches({name: value})
    assert caught.value.reason is Reason.INVALID_CONFIG


def test_every_switch_is_named_at_once() -> None:
    with pytest.raises(TokenwardError) as caught:
        verify_switches({"GRPC_TRACE": "all", "PYTHONINSPECT": "x"})
    assert {"GRPC_TRACE", "PYTHONINSPECT"} <= set(caught.value.public.replace("\n", " ").split())


@pytest.mark.parametrize("name", ["PYTHONPATH", "PYTHONHOME", "PYTHONUSERBASE"])
def test_code_from_where_others_may_write_is_refused(place: Path, name: str) -> None:
    shared = directory_in(place, "shared", mode=0o1777)
    with pytest.raises(TokenwardError, match=f"{name} .*{shared}"):
        verify_switches({name: f"{place}:{shared}"})
    verify_switches({name: str(place)})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PYTHONFAULTHANDLER", "1"),
        ("PYTHONUNBUFFERED", "1"),
        ("PYTHONPATH", ""),
        ("GRPC_TRACE", ""),
        ("GRPC_TRACE", "none"),
        ("GRPC_VERBOSITY", "error"),
        ("SSLKEYLOGFILE", ""),
    ],
)
def test_a_switch_that_shows_nothing_is_not(name: str, value: str) -> None:
    assert verify_switches({name: value}) == ()


def test_a_key_log_for_others_is_worth_a_warning() -> None:
    (note,) = verify_switches({"SSLKEYLOGFILE": "/tmp/keys"})
    assert note.level == logging.WARNING
    assert "SSLKEYLOGFILE" in note.text


# -- the process ------------------------------------------------------------------------------------------------------

_PROTECTED = """
import ctypes, os, resource
from tokenward.hardening import protect
protect()
protect()
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), status["NoNewPrivs"].strip(), oct(os.umask(0)))
print(resource.getrlimit(resource.RLIMIT_CORE), open("/proc/self/coredump_filter").read().strip())
"""


def test_a_process_is_closed_by_every_means_there_is_and_twice_does_no_harm() -> None:
    done = subprocess.run([sys.executable, "-c", _PROTECTED], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["0 1 0o77", "(0, 0) 00000000"], done.stderr


def test_debug_lines_are_those_of_the_agent_alone(capsys: pytest.CaptureFixture[str]) -> None:
    root, ours = logging.getLogger(), logging.getLogger("tokenward")
    before = (root.level, ours.level, root.handlers[:])
    try:
        logs.configure("debug")
        logging.getLogger("tokenward.vault").debug("said by us")
        for library in ("hvac", "urllib3.connectionpool", "asyncio", "anything"):
            logging.getLogger(library).debug("what passed")
            logging.getLogger(library).warning("what went wrong")
        logs.configure("error")
        logging.getLogger("tokenward.vault").warning("too little")
        logging.getLogger("asyncio").warning("too little")
    finally:
        root.handlers[:] = before[2]
        root.setLevel(before[0])
        ours.setLevel(before[1])
    said = capsys.readouterr().err
    assert "said by us" in said
    assert said.count("what went wrong") == 4
    assert "what passed" not in said
    assert "too little" not in said
