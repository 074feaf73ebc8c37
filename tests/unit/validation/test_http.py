"""A value is tried over HTTP: what counts as good, what as a no, and that whatever comes back is bounded."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from tests.fakes import vault as fake
from tests.fakes.authority import Authority, Form, ca_form, ec_key, pem
from tests.fakes.vault import FakeVault, serving
from tests.making import instant, kv_grant
from tokenward.core.model import HttpValidation, Issued, KvGrant, Template
from tokenward.core.secret import Secret
from tokenward.errors import Reason, ValidationError
from tokenward.validation import Validator

KEY = "sk-good-1"
BEARER = Template(("Bearer ", ""), ("api_key",))
TIMEOUT_S = 0.4


@dataclass(slots=True)
class Partner:
    """Another company's API: it knows one key, and says 401 to all others."""

    address: str = ""
    good: int = 200
    header: str = "Authorization"
    knows: str = f"Bearer {KEY}"
    seen: list[tuple[str, str, str | None]] = field(default_factory=list)


@contextlib.contextmanager
def open_partner(partner: Partner) -> Iterator[Partner]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            said = self.headers.get(partner.header)
            partner.seen.append((self.command, self.path, said))
            self.send_response(partner.good if said == partner.knows else 401, "s3cret of theirs")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815 -- a name that http.server looks for

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        partner.address = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, name="partner")
        thread.start()
        try:
            yield partner
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def partner() -> Iterator[Partner]:
    with open_partner(Partner()) as made:
        yield made


@pytest.fixture
def liar() -> Iterator[FakeVault]:
    """A server that answers with the lies it is given."""
    with serving(FakeVault()) as made:
        yield made


@pytest.fixture
def validator() -> Iterator[Validator]:
    made = Validator()
    yield made
    asyncio.run(made.close())


def grant(url: str, value: Template = BEARER, **options: Any) -> KvGrant:
    wanted = HttpValidation(url=url, value=value, **options)
    return KvGrant(name="api", path="secret/api", mount="secret", validate=wanted)


def issued(**values: str) -> Issued:
    secrets = {name: Secret(text) for name, text in (values or {"api_key": KEY}).items()}
    return Issued(values=secrets, issued=instant(0), expires=instant(100))


def failure_of(validator: Validator, wanted: KvGrant, value: Issued | None = None) -> ValidationError:
    with pytest.raises(ValidationError) as caught:
        asyncio.run(validator.check(wanted, value or issued()))
    return caught.value


def test_a_grant_without_check_takes_any_value_and_begins_no_thread(validator: Validator) -> None:
    before = threading.active_count()
    asyncio.run(validator.check(kv_grant(), issued(api_key="anything")))
    assert threading.active_count() == before


# -- yes and no -------------------------------------------------------------------------------------------------------


def test_a_good_value_is_asked_about_once_with_the_header_that_the_grant_names(
    validator: Validator, partner: Partner
) -> None:
    asyncio.run(validator.check(grant(partner.address + "/v1/ping?of=me"), issued()))
    assert partner.seen == [("GET", "/v1/ping?of=me", f"Bearer {KEY}")]


def test_method_header_and_template_are_the_user_s(validator: Validator, partner: Partner) -> None:
    partner.header, partner.knows, partner.good = "X-Api-Key", "{id7}sk", 204
    value = Template(("{", "}", ""), ("id", "key"))
    wanted = grant(partner.address, value, header="X-Api-Key", method="HEAD", expect=204)
    asyncio.run(validator.check(wanted, issued(id="id7", key="sk")))
    assert partner.seen == [("HEAD", "/", "{id7}sk")]


def test_a_value_that_the_far_end_refuses_fails_with_its_status_alone(validator: Validator, partner: Partner) -> None:
    got = failure_of(validator, grant(partner.address + "/v1/a-path"), issued(api_key="sk-bad"))
    assert got.public == f"{partner.address} refused the new value: it answered 401, expected 200"
    assert (got.reason, got.retryable, got.refused) == (Reason.VALIDATION_FAILED, True, True)
    assert got.__cause__ is got.__context__ is None


def test_another_good_status_than_the_expected_is_a_no(validator: Validator, partner: Partner) -> None:
    assert failure_of(validator, grant(partner.address, expect=204)).refused


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503])
def test_a_status_that_says_nothing_of_the_value_is_no_refusal(
    validator: Validator, liar: FakeVault, status: int
) -> None:
    liar.lies.append(fake.says(status, retry_after="7"))
    got = failure_of(validator, grant(liar.address))
    assert got.public == f"{liar.address} could not be asked about the new value: it answered {status}, expected 200"
    assert (got.refused, got.retry_after_s) == (False, 7.0)


def test_a_redirect_is_not_followed(validator: Validator, liar: FakeVault, partner: Partner) -> None:
    liar.lies.append(fake.redirects(partner.address))
    assert "answered 307" in failure_of(validator, grant(liar.address)).public
    assert not partner.seen


# -- what a value can do ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [f"{KEY}\r\nX-Admin: 1", f"{KEY}\n", "sk\x00", "sk\x7f", "sk-\u00e9", "sk-\ud800", ""]
)
def test_a_value_that_is_no_header_s_is_refused_before_anybody_is_asked(
    validator: Validator, partner: Partner, value: str
) -> None:
    got = failure_of(validator, grant(partner.address), issued(api_key=value))
    assert got.public.startswith("the new value cannot be tried: a field of it is empty or has characters")
    assert got.refused
    assert not partner.seen


def test_a_field_that_the_value_lacks_is_named(validator: Validator, partner: Partner) -> None:
    got = failure_of(validator, grant(partner.address), issued(key=KEY))
    assert "no field 'api_key'" in got.public
    assert not partner.seen


def test_no_text_of_the_value_or_of_the_far_end_is_told_or_logged(
    validator: Validator, partner: Partner, liar: FakeVault, caplog: pytest.LogCaptureFixture
) -> None:
    liar.lies.append(fake.writes(b"s3cret\r\n\r\n"))
    liar.lies.append(fake.writes(b"HTTP/1.1 200 OK\r\ns3cret\r\nContent-Length: 2\r\n\r\n{}"))
    with caplog.at_level("DEBUG"):
        told = [
            repr(failure_of(validator, grant(partner.address), issued(api_key="sk-bad"))),
            repr(failure_of(validator, grant(partner.address), issued(api_key="sk-bad\r\n"))),
            repr(failure_of(validator, grant(liar.address))),
        ]
        asyncio.run(validator.check(grant(liar.address), issued()))
    assert not any(secret in text for text in (*told, caplog.text) for secret in ("sk-bad", "s3cret", KEY))


# -- what a far end can do --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lie", [fake.HEADER_DRIP, fake.hangs], ids=["drip", "silence"])
def test_an_answer_that_does_not_come_is_given_up_in_time(validator: Validator, liar: FakeVault, lie: fake.Lie) -> None:
    liar.lies.append(lie)
    begun = time.monotonic()
    got = failure_of(validator, grant(liar.address, timeout_s=TIMEOUT_S))
    asyncio.run(validator.close())
    assert time.monotonic() - begun < 5 * TIMEOUT_S
    assert got.public == f"{liar.address} could not be asked about the new value: it took too long"
    assert not got.refused


def test_a_check_that_waits_for_a_thread_has_the_same_deadline(liar: FakeVault, partner: Partner) -> None:
    validator = Validator(threads=1)

    async def both() -> None:
        liar.lies.append(fake.hangs)
        hanging = asyncio.create_task(validator.check(grant(liar.address, timeout_s=10 * TIMEOUT_S), issued()))
        while not liar.requests:
            await asyncio.sleep(0.01)
        with pytest.raises(ValidationError, match="took too long"):
            await validator.check(grant(partner.address, timeout_s=TIMEOUT_S), issued())
        hanging.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await hanging
        liar.stopped.set()
        await validator.close()

    asyncio.run(both())
    assert not partner.seen


@pytest.mark.parametrize("lie", [fake.huge(50 << 20), fake.DRIP, fake.CHUNK_LINE], ids=["50 MB", "drip", "no chunk"])
def test_a_body_is_never_read(validator: Validator, liar: FakeVault, lie: fake.Lie) -> None:
    liar.lies.append(lie)
    asyncio.run(validator.check(grant(liar.address), issued()))


@pytest.mark.parametrize(
    ("lie", "told"),
    [
        (fake.CONTINUES, "answered with more than 65536 bytes of headers"),
        (fake.endless(b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n" * 1000), "broke off"),
        (fake.endless(b"HTTP/1.1 200 OK\r\nX-A: ", b"a" * 4096), "answered with more than 65536 bytes of headers"),
        (fake.writes(b""), "broke off"),
        (fake.resets, "cannot be reached (Connection reset by peer)"),
        (fake.writes(b"SSH-2.0-s3cret\r\n"), "broke off"),
    ],
    ids=["endless 100 Continue", "endless headers", "endless header", "nothing", "reset", "no HTTP"],
)
def test_what_is_no_bounded_answer_is_not_good(validator: Validator, liar: FakeVault, lie: fake.Lie, told: str) -> None:
    liar.lies.append(lie)
    got = failure_of(validator, grant(liar.address))
    assert got.public.startswith(f"{liar.address} could not be asked about the new value: it {told}")
    assert not got.refused


def test_nobody_there_and_no_such_name_are_told(validator: Validator, partner: Partner) -> None:
    assert "cannot be reached (Connection refused)" in failure_of(validator, grant("http://127.0.0.1:1")).public
    assert "cannot be resolved" in failure_of(validator, grant("https://nobody.invalid")).public


def test_nothing_of_the_environment_is_used(
    validator: Validator, partner: Partner, liar: FakeVault, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, liar.address)
    asyncio.run(validator.check(grant(partner.address), issued()))
    assert not liar.requests


# -- TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.root(ca_form("partner CA", now=time.time()))


@pytest.fixture
def tls_partner(authority: Authority, tmp_path: Path) -> Iterator[FakeVault]:
    """Has a certificate of the authority for 127.0.0.1, and answers 200 to everything."""
    key = ec_key()
    name = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    form = Form(common_name="partner", names=(name,), begins=time.time() - 60, ends=time.time() + 3600)
    files = tmp_path / "partner.pem", tmp_path / "partner.key"
    files[0].write_text(pem(authority.sign(form, key.public_key())))
    plain = serialization.NoEncryption()
    files[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*files)
    with serving(FakeVault(), tls=context) as made:
        made.lies.append(fake.says(200))
        yield made


def test_a_certificate_of_the_ca_file_is_trusted(
    validator: Validator, tls_partner: FakeVault, authority: Authority, tmp_path: Path
) -> None:
    (tmp_path / "ca.pem").write_text(pem(authority.certificate))
    asyncio.run(validator.check(grant(tls_partner.address, ca_file=str(tmp_path / "ca.pem")), issued()))
    assert [seen.headers["Authorization"] for seen in tls_partner.requests] == [f"Bearer {KEY}"]


def test_any_other_certificate_hears_nothing(
    validator: Validator, tls_partner: FakeVault, authority: Authority, tmp_path: Path
) -> None:
    (tmp_path / "ca.pem").write_text(pem(authority.certificate))
    by_name = tls_partner.address.replace("127.0.0.1", "localhost")
    for wanted in (grant(tls_partner.address), grant(by_name, ca_file=str(tmp_path / "ca.pem"))):
        assert "a TLS certificate that is not trusted" in failure_of(validator, wanted).public
    assert not tls_partner.requests


def test_a_ca_file_that_is_not_there_is_named(validator: Validator) -> None:
    got = failure_of(validator, grant("https://127.0.0.1:1", ca_file="/nowhere/ca.pem"))
    assert "needs a file that cannot be read: /nowhere/ca.pem" in got.public
