"""The forms of single values."""

from __future__ import annotations

import pytest

from tokenward.config import values
from tokenward.core.identity import Selector
from tokenward.core.model import Template


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("15m", 900.0), ("250ms", 0.25), ("1h30m", 5400.0), ("2s", 2.0), ("1d", 86400.0), ("1m5s10ms", 65.01)],
)
def test_durations(written: str, seconds: float) -> None:
    assert values.duration()(written) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "written",
    ["", "s", "15", "-1s", "1.5s", "1 s", "30m1h", "1m1m", "1S", "\uff11s", "0s", "367d", "9" * 20 + "s", [], None],
)
def test_what_is_no_duration(written: object) -> None:
    with pytest.raises(ValueError, match="expected a duration"):
        values.duration()(written)


@pytest.mark.parametrize("number", [2, 2.5])
def test_a_bare_number_is_told_to_have_a_unit(number: float) -> None:
    with pytest.raises(ValueError, match=rf'"{number}s".*not a bare number'):
        values.duration()(number)
    with pytest.raises(ValueError, match="not a bare number"):
        values.size(number)


@pytest.mark.parametrize(("written", "size"), [("512B", 512), ("64KiB", 65536), ("1MiB", 1 << 20), ("2GiB", 2 << 30)])
def test_sizes(written: str, size: int) -> None:
    assert values.size(written) == size


@pytest.mark.parametrize("written", ["", "0B", "64", "64KB", "64kib", "1.5MiB", "-1B", "1KiB1B", True, None])
def test_what_is_no_size(written: object) -> None:
    with pytest.raises(ValueError, match="expected a size"):
        values.size(written)


@pytest.mark.parametrize(("written", "mode"), [("0666", 0o666), ("660", 0o660)])
def test_file_modes(written: str, mode: int) -> None:
    assert values.file_mode(written) == mode


@pytest.mark.parametrize("written", ["", "0888", "1777", "66", "0o666", 438])
def test_what_is_no_file_mode(written: object) -> None:
    with pytest.raises(ValueError, match="octal"):
        values.file_mode(written)


@pytest.mark.parametrize(
    ("written", "becomes"),
    [
        ("https://vault.example:8200", "https://vault.example:8200"),
        ("https://vault.example/", "https://vault.example"),
        ("https://[2001:db8::1]:8200", "https://[2001:db8::1]:8200"),
        ("http://127.0.0.1:8200", "http://127.0.0.1:8200"),
        ("http://[::1]:8200", "http://[::1]:8200"),
        ("http://localhost:8200", "http://localhost:8200"),
        ("unix:///run/vault.sock", "unix:///run/vault.sock"),
    ],
)
def test_vault_addresses(written: str, becomes: str) -> None:
    assert values.vault_address(written) == becomes


@pytest.mark.parametrize(
    "written",
    [
        "",
        "vault.example:8200",
        "ftp://vault.example",
        "https://",
        "https://user:password@vault.example",
        "https://vault.example/path",
        "https://vault.example?x=1",
        "https://vault.example#x",
        "https://vault.example:99999",
        "https://vault.example:0",
        "https://vault.example:",
        "https://vau lt.example",
        "https://vault.example\n",
        "https://[::1",
        "http://vault.example:8200",
        "http://10.0.0.1:8200",
        "http://localhost.example",
        "http://127.0.0.1@vault.example",
        "unix://run/vault.sock",
        "unix:///run/../vault.sock",
        "unix:///" + "a" * 107,
        1,
    ],
)
def test_what_is_no_vault_address(written: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        values.vault_address(written)


@pytest.mark.parametrize("written", ["", " ", "a\nb", "\x1b[31m", "\0", 1, ["a"]])
def test_what_is_no_text_of_one_line(written: object) -> None:
    with pytest.raises(ValueError, match="expected a string of one line"):
        values.text(written)


@pytest.mark.parametrize("written", ["", "/", "a", "./a", "/a/", "/a/../b", "//a", "/a//b", "/a\nb", "/a\0b", 1])
def test_what_is_no_absolute_path(written: object) -> None:
    with pytest.raises(ValueError, match="expected an absolute path"):
        values.absolute_path(written)


def test_a_socket_path_fits_into_a_socket_address() -> None:
    longest = "/" + "a" * 106
    assert values.socket_path(longest) == longest
    for path in (longest + "a", "/" + "ä" * 54):
        with pytest.raises(ValueError, match="at most 107 bytes"):
            values.socket_path(path)


def test_the_directory_of_a_socket_leaves_room_for_its_name() -> None:
    assert values.socket_directory("/" + "a" * 89)
    with pytest.raises(ValueError, match="at most 90 bytes"):
        values.socket_directory("/" + "a" * 90)


@pytest.mark.parametrize(
    "written",
    [
        "unix:uid:1001",
        "unix:path:/usr/bin/a b",
        "unix:sha256:" + "0f" * 32,
        "systemd:unit:foo@1.service",
        "systemd:slice:a-b.slice",
        "lsm:label:system_u:object_r:x_t",
    ],
)
def test_selectors(written: str) -> None:
    assert values.selector(written) == Selector.parse(written)


@pytest.mark.parametrize(
    "written",
    [
        "unix:uid:root",
        "unix:uid:007",
        "unix:uid:-1",
        "unix:uid:4294967295",
        "unix:uid:" + "9" * 5000,
        "unix:uid:²",
        "unix:uid:",
        "unix:path:bin/a",
        "unix:path:/bin/*",
        "unix:path:/a/../b",
        "unix:sha256:" + "0F" * 32,
        "unix:sha256:00",
        "systemd:unit:foo",
        "systemd:unit:foo@*.service",
        "systemd:slice:foo",
        "k8s:ns:*",
        "unix:user",
        "uid:1",
    ],
)
def test_what_no_process_could_have_is_no_selector(written: str) -> None:
    with pytest.raises(ValueError, match=r"expected|unknown selector type|needs a value"):
        values.selector(written)


# -- how a new value is tried -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "written",
    [
        "https://api.partner.example/v1/ping",
        "https://api.partner.example",
        "https://api.partner.example:8443/a%20b?x=1&y=(2)",
        "https://[2001:db8::1]/",
        "http://127.0.0.1:80/a",
        "http://[::1]/",
        "http://localhost",
    ],
)
def test_urls(written: str) -> None:
    assert values.url(written) == written


@pytest.mark.parametrize(
    "written",
    [
        "",
        "api.partner.example",
        "ftp://a.example/",
        "unix:///run/a.sock",
        "https://",
        "https:///a",
        "https://user:password@a.example/",
        "https://a.example/#x",
        "https://a.example/{api_key}",
        "https://a.example/a b",
        "https://a.example/\u00e9",
        "https://a.example\\@b.example/",
        "https://a.example:0/",
        "https://a.example:65536/",
        "https://a.example/\r\nX: y",
        "http://a.example/",
        "http://10.0.0.1/",
        "http://127.0.0.1@a.example/",
        "http://localhost.example/",
        1,
    ],
)
def test_what_is_no_url(written: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        values.url(written)


@pytest.mark.parametrize(
    ("written", "template"),
    [
        ("Bearer {api_key}", Template(("Bearer ", ""), ("api_key",))),
        ("{a}", Template(("", ""), ("a",))),
        ("{a}:{b b}!", Template(("", ":", "!"), ("a", "b b"))),
        ('{{"k": "{a}"}}', Template(('{"k": "', '"}'), ("a",))),
        ("{{{a}}}", Template(("{", "}"), ("a",))),
        ("{a.__class__}", Template(("", ""), ("a.__class__",))),
    ],
)
def test_templates_of_a_header(written: str, template: Template) -> None:
    assert values.header_template(written) == template


@pytest.mark.parametrize(
    "written",
    ["", "Bearer sk_live", "{{a}}", "{}", "{a", "a}", "{a}}", "{{a}", "{a}\r\nX: y", "\u00e9 {a}", 1, ["{a}"]],
)
def test_what_is_no_template_of_a_header_is_not_repeated(written: object) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        values.header_template(written)
    assert "sk_live" not in str(caught.value)


@pytest.mark.parametrize(
    "written", ["", "a b", "a:", "X\r\nY", "\u00e9", "Host", "content-length", "Connection", "TE", 1]
)
def test_what_is_no_header_for_a_value(written: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        values.header_name(written)


@pytest.mark.parametrize("written", [0, 100, 199, 600, 200.5, "200", True, [200], float("nan")])
def test_what_is_no_status(written: object) -> None:
    with pytest.raises(ValueError, match="expected a status"):
        values.status_code(written)


@pytest.mark.parametrize(
    ("written", "becomes"),
    [
        ("db.acme.example:6432/ledger", ("db.acme.example", 6432, "ledger")),
        ("127.0.0.1/a b", ("127.0.0.1", 5432, "a b")),
        ("[::1]:5433/x", ("::1", 5433, "x")),
        ("/run/postgresql/ledger", ("/run/postgresql", 5432, "ledger")),
        ("/run/postgresql:5433/ledger", ("/run/postgresql", 5433, "ledger")),
    ],
)
def test_addresses_of_a_database(written: str, becomes: tuple[str, int, str]) -> None:
    assert values.database_address(written) == becomes


@pytest.mark.parametrize(
    "written",
    [
        "",
        "db.acme.example",
        "db.acme.example:5432",
        "db.acme.example/",
        "a,b/x",
        "user:password@a/x",
        "postgresql://a/x",
        "a:0/x",
        "a:65536/x",
        "::1/x",
        "/run/../x/y",
        "/x",
        "a/x/y",
        "a/x\n",
        1,
    ],
)
def test_what_is_no_address_of_a_database(written: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        values.database_address(written)
