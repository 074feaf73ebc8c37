"""What a connection's first bytes say it speaks, and the answer to those that the front door does not serve.

Owns the judgement and the texts; reads and writes nothing itself. Invariant: only bytes that begin with the whole
HTTP/2 client preface are ever judged to be gRPC, and a judgement, once given, does not change with more bytes.
"""

from __future__ import annotations

import re
from enum import Enum, auto

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""What every HTTP/2 client with prior knowledge sends first (RFC 9113, section 3.4)."""

_METHOD = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}"
_REQUEST_LINE = re.compile(_METHOD + rb" [\x21-\x7e]+ HTTP/1\.[01]\r?")
_REQUEST_LINE_BEGUN = re.compile(_METHOD + rb"(?: [\x21-\x7e]*(?: [HTP/1.0\r]{0,9})?)?")
_HEAD_END = re.compile(rb"\n\r?\n")


class Verdict(Enum):
    """What the bytes so far are."""

    UNDECIDED = auto()
    GRPC = auto()
    HTTP = auto()
    """A whole HTTP/1.x request head."""
    TOO_LONG = auto()
    """An HTTP/1.x request whose head does not end within the limit."""
    MALFORMED = auto()
    """Neither, whatever follows."""


def judge(first: bytes, *, max_head_bytes: int) -> Verdict:
    """What `first`, all the bytes of a connection so far, shows it to speak."""
    if first.startswith(PREFACE):
        return Verdict.GRPC
    if PREFACE.startswith(first):
        return Verdict.UNDECIDED
    line, newline, _ = first.partition(b"\n")
    if not (_REQUEST_LINE if newline else _REQUEST_LINE_BEGUN).fullmatch(line):
        return Verdict.MALFORMED
    head_end = _HEAD_END.search(first, endpos=max_head_bytes)
    if head_end:
        return Verdict.HTTP
    return Verdict.UNDECIDED if len(first) < max_head_bytes else Verdict.TOO_LONG


_ANSWERS = {
    Verdict.HTTP: (
        "501 Not Implemented",
        "This socket speaks gRPC for now: call tokenward.v1.CredentialService; an HTTP interface comes later.\n",
    ),
    Verdict.TOO_LONG: ("431 Request Header Fields Too Large", "The request head is too long for this socket.\n"),
    Verdict.MALFORMED: (
        "400 Bad Request",
        "These bytes are neither HTTP/2 nor HTTP/1.1: this socket speaks gRPC (tokenward.v1.CredentialService).\n",
    ),
}


def refusal(verdict: Verdict, first: bytes) -> bytes:
    """The whole HTTP/1.1 response for a connection that was judged to be anything but gRPC."""
    status, text = _ANSWERS[verdict]
    head = (
        f"HTTP/1.1 {status}\r\n"
        "Content-Type: text/plain; charset=utf-8\r\n"
        f"Content-Length: {len(text)}\r\n"
        "Connection: close\r\n\r\n"
    )
    # RFC 9110, section 9.3.2: the answer to HEAD ends with its head.
    return (head if first.startswith(b"HEAD ") else head + text).encode()
