"""One address: whatever comes back, it is bounded in bytes and in time, and nobody else is asked."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes import vault as fake
from tests.fakes.vault import FakeVault, serving
from tokenward.vault.connections import TlsFiles
from tokenward.vault.transport import Answer, Transport, Unusable, quote_path

TIMEOUT_S = 0.4
MAX_BYTES = 100_000


@pytest.fixture(params=["unix", "tcp"])
def vault(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FakeVault]:
    socket_path = str(tmp_path / "vault.sock") if request.param == "unix" else None
    with serving(FakeVault(), socket_path=socket_path) as made:
        yield made


@pytest.fixture
def transport(vault: FakeVault) -> Iterator[Transport]:
    made = Transport(address=vault.address, tls=TlsFiles(), max_reply_bytes=MAX_BYTES, connections=2)
    yield made
    made.close()


def send(
    transport: Transport, path: str = "sys/health", *, timeout_s: float = 10.0, token: str = ""
) -> Answer | Unusable:
    headers = {"X-Vault-Token": token} if token else {}
    return transport.send("GET", path, query={}, headers=headers, body=None, timeout_s=timeout_s)


def test_an_answer_comes_whole_with_its_headers(vault: FakeVault, transport: Transport) -> None:
    vault.lies.append(fake.says(429, {"errors": []}, retry_after="7", x_vault_index="abc"))
    assert send(transport) == Answer(429, b'{"errors": []}', retry_after="7", index="abc")


@pytest.mark.parametrize(
    "lie",
    [
        fake.huge(50 << 20),
        fake.huge(50 << 20, declared=False),
        fake.CONTINUES,
        fake.says(200, fake.gzip_bomb(50 << 20), content_encoding="gzip"),
        fake.redirects("http://127.0.0.1:1/", body=fake.gzip_bomb(50 << 20), content_encoding="gzip"),
    ],
    ids=["50 MB", "50 MB undeclared", "endless 100 Continue", "gzip bomb", "gzip bomb in a redirect"],
)
def test_a_body_too_large_is_refused_and_never_inflated(vault: FakeVault, transport: Transport, lie: fake.Lie) -> None:
    vault.lies.append(lie)
    before_mib = _forget_peak()
    got = send(transport)
    assert isinstance(got, Unusable)
    assert got.refused
    assert _resident_mib("VmHWM") - before_mib < 20


@pytest.mark.parametrize("lie", [fake.DRIP, fake.HEADER_DRIP, fake.hangs], ids=["body drip", "header drip", "silence"])
def test_an_answer_that_never_ends_is_given_up_in_time(vault: FakeVault, transport: Transport, lie: fake.Lie) -> None:
    vault.lies.append(lie)
    begun = time.monotonic()
    got = send(transport, timeout_s=TIMEOUT_S)
    assert time.monotonic() - begun < 5 * TIMEOUT_S
    assert got == Unusable("did not answer in time", sent=True)


@pytest.mark.parametrize(
    "lie",
    [
        fake.writes(b"s3cret\r\n\r\n"),
        fake.writes(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"),
        fake.writes(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\ns3cret\r\n"),
        fake.writes(b""),
        fake.CHUNK_LINE,
        fake.resets,
    ],
    ids=["no HTTP", "half", "bad chunk", "nothing", "endless chunk line", "reset"],
)
def test_what_is_not_http_is_told_in_our_words(vault: FakeVault, transport: Transport, lie: fake.Lie) -> None:
    vault.lies.append(lie)
    got = send(transport)
    assert isinstance(got, Unusable)
    assert got.sent
    assert "s3cret" not in got.why


def test_malformed_headers_are_not_logged(
    vault: FakeVault, transport: Transport, caplog: pytest.LogCaptureFixture
) -> None:
    vault.lies.append(fake.writes(b"HTTP/1.1 200 OK\r\ns3cret\r\nContent-Length: 2\r\n\r\n{}"))
    with caplog.at_level("DEBUG"):
        send(transport)
    assert "s3cret" not in caplog.text


def test_a_redirect_is_an_answer_and_its_target_hears_nothing(vault: FakeVault, transport: Transport) -> None:
    with serving(FakeVault()) as other:
        vault.lies.append(fake.redirects(f"{other.address}/v1/sys/health"))
        got = send(transport, token="s.mine")
        assert isinstance(got, Answer)
        assert got.status == 307
        assert not other.requests


def test_one_connection_serves_many_paths(vault: FakeVault, transport: Transport) -> None:
    for number in range(5):
        send(transport, f"secret/data/{number}")
    assert (len(vault.requests), vault.connections) == (5, 1)


def test_no_token_cookie_or_proxy_comes_from_the_environment(
    vault: FakeVault, transport: Transport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".vault-token").write_text("s.foreign")
    (tmp_path / ".netrc").write_text("default login foreign password foreign\n")
    for name, value in {
        "HOME": str(tmp_path),
        "NETRC": str(tmp_path / ".netrc"),
        "VAULT_TOKEN": "s.foreign",
        "HTTP_PROXY": "http://127.0.0.1:1",
        "http_proxy": "http://127.0.0.1:1",
    }.items():
        monkeypatch.setenv(name, value)
    vault.lies.append(fake.says(200, {}, set_cookie="session=1"))
    assert isinstance(send(transport), Answer)
    assert isinstance(send(transport), Answer)
    sent = [name.lower() for seen in vault.requests for name in seen.headers]
    assert not {"x-vault-token", "authorization", "cookie"} & set(sent)
    assert vault.requests[0].headers["Accept-Encoding"] == "identity"


def test_a_header_with_a_line_break_is_never_sent(vault: FakeVault, transport: Transport) -> None:
    got = send(transport, token="s.a\r\nX-Other: b")
    assert isinstance(got, Unusable)
    assert not got.sent
    assert "s.a" not in got.why
    assert not vault.requests


def test_a_path_arrives_as_it_was_meant(vault: FakeVault, transport: Transport) -> None:
    send(transport, "secret/data/my app?x=1#%2e/spiffe://a.example/b")
    assert vault.requests[0].path == "/v1/secret/data/my%20app%3Fx=1%23%252e/spiffe:/%2Fa.example/b"


def test_no_slash_is_lost_however_many_there_are() -> None:
    assert "//" not in quote_path("a///b////c")
    assert quote_path("a///b").replace("%2F", "/") == "a///b"


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("http://127.0.0.1:1", "cannot be reached (Connection refused)"),
        ("http://no-such-host.invalid", "has a name that cannot be resolved"),
        ("unix:///no/such/vault.sock", "cannot be reached (No such file or directory)"),
    ],
)
def test_an_address_where_nobody_listens_was_not_asked(address: str, why: str) -> None:
    transport = Transport(address=address, tls=TlsFiles(), max_reply_bytes=MAX_BYTES, connections=1)
    got = send(transport)
    assert isinstance(got, Unusable)
    assert not got.sent
    assert got.why.startswith(why)


def test_a_ca_file_that_is_not_there_is_named() -> None:
    tls = TlsFiles(ca_file="/no/such/ca.pem")
    transport = Transport(address="https://127.0.0.1:1", tls=tls, max_reply_bytes=MAX_BYTES, connections=1)
    got = send(transport)
    assert isinstance(got, Unusable)
    assert got.why == "cannot be asked: /no/such/ca.pem: No such file or directory"


def _forget_peak() -> float:
    """Makes the kernel measure peak memory from now on; what is resident now."""
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")
    return _resident_mib("VmRSS")


def _resident_mib(field: str) -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field))
