"""What counts as gRPC, as HTTP and as neither."""

import pytest

from tokenward.serve.first_bytes import PREFACE, Verdict, judge, refusal

GET = b"GET /credentials/ledger-db HTTP/1.1\r\nHost: localhost\r\n\r\n"


def verdict(first: bytes) -> Verdict:
    return judge(first, max_head_bytes=8192)


def test_the_whole_preface_is_grpc_with_and_without_what_follows() -> None:
    assert verdict(PREFACE) is Verdict.GRPC
    assert verdict(PREFACE + b"\0\0\0\4\0\0\0\0\0") is Verdict.GRPC


@pytest.mark.parametrize("length", range(len(PREFACE)))
def test_a_part_of_the_preface_is_undecided(length: int) -> None:
    assert verdict(PREFACE[:length]) is Verdict.UNDECIDED


@pytest.mark.parametrize("length", range(1, len(GET)))
def test_a_part_of_a_request_head_is_undecided(length: int) -> None:
    assert verdict(GET[:length]) is Verdict.UNDECIDED


@pytest.mark.parametrize("request_head", [GET, b"HEAD / HTTP/1.0\n\n", b"PROPFIND * HTTP/1.1\r\n\r\nbody"])
def test_a_whole_request_head_is_http(request_head: bytes) -> None:
    assert verdict(request_head) is Verdict.HTTP


@pytest.mark.parametrize(
    "garbage",
    [
        b"\0",
        b"\x16\x03\x01\x02\x00",  # a TLS client hello
        b"hello there\n",
        b"GET /\r\n",  # HTTP/0.9
        b"GET / HTTP/2.0\r\n",
        b"GET  / HTTP/1.1\r\n",
        b"PRI * HTTP/2.0\r\n\r\nXX",
        b"A" * 33,
        b"GET /a b c",
    ],
)
def test_what_can_become_neither_is_malformed(garbage: bytes) -> None:
    assert verdict(garbage) is Verdict.MALFORMED


def test_a_head_may_be_as_long_as_the_limit_and_no_longer() -> None:
    head = b"GET / HTTP/1.1\r\nX: "
    fits = head + b"x" * (8192 - len(head) - 4) + b"\r\n\r\n"
    assert verdict(fits) is Verdict.HTTP
    assert verdict(head + b"x" * (8192 - len(head))) is Verdict.TOO_LONG
    assert verdict(head + b"x" * 8192 + b"\r\n\r\n") is Verdict.TOO_LONG


@pytest.mark.parametrize("outcome", [Verdict.HTTP, Verdict.TOO_LONG, Verdict.MALFORMED])
def test_a_refusal_announces_its_length_and_the_end(outcome: Verdict) -> None:
    head, _, body = refusal(outcome, GET).partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head.split(b"\r\n")
    assert b"Connection: close" in head.split(b"\r\n")
    assert body.count(b"\n") == 1
    assert body.endswith(b"\n")


def test_the_answer_to_head_has_no_body() -> None:
    assert refusal(Verdict.HTTP, b"HEAD / HTTP/1.1\r\n\r\n").endswith(b"\r\n\r\n")
