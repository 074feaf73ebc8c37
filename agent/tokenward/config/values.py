"""How one value of the configuration is written: durations, sizes, paths, addresses, names, selectors.

Owns: one parser for each form. Each takes what TOML gave and returns what the agent uses, or raises ValueError with a
text that says what was expected. Leaves to others where a value stands (`toml_lines`) and what it is for (`sections`).

Invariant: no text repeats a value that could be a secret pasted into the wrong key; only words of closed sets and the
parts of selectors and names are quoted.
"""

from __future__ import annotations

import ipaddress
import posixpath
import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import TypeGuard
from urllib.parse import urlsplit

from tokenward.core.identity import Selector, verify_trust_domain
from tokenward.core.model import Template

MAX_SOCKET_PATH_BYTES = 107
"""What fits into sockaddr_un with its closing zero byte (unix(7))."""

MAX_SOCKET_DIRECTORY_BYTES = MAX_SOCKET_PATH_BYTES - 17
"""Leaves room for a name of 16 bytes after the slash."""

_DURATION = re.compile(
    r"(?:([0-9]{1,9})d)?(?:([0-9]{1,9})h)?(?:([0-9]{1,9})m)?(?:([0-9]{1,9})s)?(?:([0-9]{1,9})ms)?", re.ASCII
)
_DURATION_UNITS_S = (86400.0, 3600.0, 60.0, 1.0, 0.001)
_MOST_S = 366 * 86400.0
_SIZE = re.compile(r"([0-9]{1,9})(B|KiB|MiB|GiB)", re.ASCII)
_SIZE_UNITS = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
_MOST = 1_000_000
_RATE = re.compile(r"([0-9]{1,6})/(s|m)", re.ASCII)
_FILE_MODE = re.compile(r"0?[0-7]{3}", re.ASCII)
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}", re.ASCII)
_VAULT_SEGMENT = re.compile(r"[A-Za-z0-9._@:=~-]+", re.ASCII)
_SCOPE = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_NO_ADDRESS = 'expected an address such as "https://vault.example:8200" or "unix:///run/vault.sock"'
_HOST = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]", re.ASCII)
_NO_URL = 'expected a URL such as "https://api.partner.example/v1/ping", without user, fragment or fields'
_URL = re.compile(rf"(https?)://({_HOST.pattern})(:[0-9]{{1,5}})?(?:/[!$-;=?-Z_a-z~@\[\]]*)?", re.ASCII)
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", re.ASCII)
_FRAMING_HEADERS = frozenset(
    ("host", "connection", "content-length", "expect", "te", "trailer", "transfer-encoding", "upgrade")
)
_TEMPLATE_PART = re.compile(r"(?P<text>[^{}]+|\{\{|\}\})|\{(?P<field>[^{}]+)\}")
_DATABASE = re.compile(rf"(/[^:]+|{_HOST.pattern})(?::([0-9]{{1,5}}))?/([^/]+)", re.ASCII)
_POSTGRESQL_PORT = 5432

_UNIT_SUFFIXES = (".service", ".scope", ".socket", ".mount", ".swap")


def text(value: object) -> str:
    """Any text on one line, without control characters, that is not blank."""
    if isinstance(value, str) and value.strip() and value.isprintable():
        return value
    raise ValueError("expected a string of one line that is not empty")


def flag(value: object) -> bool:
    """True or false."""
    if isinstance(value, bool):
        return value
    raise ValueError("expected true or false")


def one_of(words: Iterable[str]) -> Callable[[object], str]:
    """A parser for a closed set of words."""
    known = tuple(words)

    def parse(value: object) -> str:
        if isinstance(value, str) and value in known:
            return value
        close = get_close_matches(value, known, n=1) if isinstance(value, str) else []
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"expected one of {', '.join(map(repr, known))}{hint}")

    return parse


# -- quantities -----------------------------------------------------------------------------------------------------


def duration(*, least_s: float = 0.001) -> Callable[[object], float]:
    """A parser for durations in seconds, from `least_s` to 366 days."""

    def parse(value: object) -> float:
        if is_number(value):
            raise ValueError(f'expected a duration with its unit, such as "{value}s" or "15m", not a bare number')
        found = _DURATION.fullmatch(value) if isinstance(value, str) and value else None
        if found is None:
            raise ValueError('expected a duration such as "250ms", "30s", "15m" or "1h30m" (units d, h, m, s, ms)')
        seconds = sum(int(count or 0) * unit for count, unit in zip(found.groups(), _DURATION_UNITS_S, strict=True))
        if not least_s <= seconds <= _MOST_S:
            raise ValueError(f"expected a duration from {least_s:g}s to 366d")
        return seconds

    return parse


def size(value: object) -> int:
    """Bytes, at least one."""
    if is_number(value):
        raise ValueError('expected a size with its unit, such as "64KiB", not a bare number')
    found = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if found is None or found[1].strip("0") == "":
        raise ValueError('expected a size such as "512B", "64KiB" or "1MiB" (units B, KiB, MiB, GiB)')
    return int(found[1]) * _SIZE_UNITS[found[2]]


def head_size(value: object) -> int:
    """Bytes of a request's head, that must hold what every client sends, and fit into a buffer."""
    if not 1024 <= (count := size(value)) <= 65536:
        raise ValueError('expected a size from "1KiB" to "64KiB"')
    return count


def count(value: object) -> int:
    """How many, at least one."""
    if not is_number(value) or isinstance(value, float) or not 0 < value <= _MOST:
        raise ValueError(f"expected a whole number from 1 to {_MOST}")
    return value


def refresh_share(value: object) -> float:
    """Share of a lifetime: above 0.1, at most 0.9."""
    if not is_number(value) or not 0.1 < value <= 0.9:
        raise ValueError(
            "expected a number above 0.1 and at most 0.9: the share of the lifetime after which to refresh"
        )
    return float(value)


def rate(value: object) -> float:
    """Events per second, more than none."""
    found = _RATE.fullmatch(value) if isinstance(value, str) else None
    if found is None or not int(found[1]):
        raise ValueError('expected a rate such as "10/s" or "30/m"')
    return int(found[1]) / (60 if found[2] == "m" else 1)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether TOML wrote a number (in Python, true and false would be numbers too)."""
    return isinstance(value, int | float) and not isinstance(value, bool)


# -- names and places -----------------------------------------------------------------------------------------------


def name(value: object) -> str:
    """The name of a workload, a credential or a policy."""
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError("expected a name of 1 to 63 of a-z 0-9 -, that does not begin with -")
    return value


def trust_domain(value: object) -> str:
    """A SPIFFE trust domain name, without the scheme."""
    verify_trust_domain(given := text(value))
    return given


def file_mode(value: object) -> int:
    """Permissions of a file, in octal as a string."""
    if not isinstance(value, str) or not _FILE_MODE.fullmatch(value):
        raise ValueError('expected an octal file mode as a string, such as "0666"')
    return int(value, 8)


def absolute_path(value: object) -> str:
    """An absolute path without `.`, `..`, `//` or a closing slash."""
    if not isinstance(value, str) or not value.isprintable() or not _is_plain_path(value):
        raise ValueError("expected an absolute path such as /etc/tokenward/ca.pem, without '.', '..' or '//'")
    return value


def socket_path(value: object) -> str:
    """An absolute path that fits into a socket address."""
    if len((path := absolute_path(value)).encode()) > MAX_SOCKET_PATH_BYTES:
        raise ValueError(f"expected a path of at most {MAX_SOCKET_PATH_BYTES} bytes: the kernel's limit for a socket")
    return path


def socket_directory(value: object) -> str:
    """An absolute path that leaves room for the name of a socket in it."""
    if len((path := absolute_path(value)).encode()) > MAX_SOCKET_DIRECTORY_BYTES:
        raise ValueError(f"expected a path of at most {MAX_SOCKET_DIRECTORY_BYTES} bytes: a socket is made in it")
    return path


def vault_path(value: object) -> str:
    """A path at the vault, without a closing slash. Its characters are safe in a URL and in a policy."""
    given = text(value)
    segments = given.removesuffix("/").split("/")
    if not all(_VAULT_SEGMENT.fullmatch(segment) and segment not in {".", ".."} for segment in segments):
        raise ValueError(
            "expected a path such as secret/teams/billing: segments of A-Z a-z 0-9 . _ @ : = ~ -, no leading slash,"
            " no '..', no '//' and no wildcard"
        )
    return "/".join(segments)


def vault_path_under(verb: str, example: str) -> Callable[[object], str]:
    """A parser for `<mount>/<verb>/<name>`."""

    def parse(value: object) -> str:
        segments = (path := vault_path(value)).split("/")
        if len(segments) < 3 or segments[-2] != verb:
            raise ValueError(f"expected a path of the form {example}")
        return path

    return parse


def path_in_mount(value: object) -> str:
    """A vault path of a mount and something in it."""
    path = vault_path(value)
    if "/" not in path:
        raise ValueError("expected the mount and a path in it, such as secret/teams/billing")
    return path


def scope(value: object) -> str:
    """One OAuth scope (RFC 6749 section 3.3): several are joined by spaces, so one with a space would be two."""
    if not isinstance(value, str) or not _SCOPE.fullmatch(value):
        raise ValueError("expected one scope, such as payouts:read, without spaces, quotes or backslashes")
    return value


def segment(value: object) -> str:
    """The name of one thing at the vault, such as a role."""
    if "/" in (path := vault_path(value)):
        raise ValueError("expected one name, without a slash")
    return path


def vault_address(value: object) -> str:
    """`https://host:port`, `unix:///path`, or `http://` of this very host, without a closing slash.

    Plain HTTP beyond loopback is refused: tokens would cross the network in clear, to a vault that nobody verified.
    """
    given = text(value)
    if given.startswith("unix://"):
        return "unix://" + socket_path(given.removeprefix("unix://"))
    try:
        parts = urlsplit(given)
        port = parts.port
    except ValueError:
        raise ValueError(_NO_ADDRESS) from None
    bare = given.removesuffix("/")
    written = bare.partition("://")[2].rpartition(":")[0] if port else bare.partition("://")[2]
    if not _HOST.fullmatch(written) or parts.scheme not in {"https", "http"}:
        raise ValueError(_NO_ADDRESS)
    if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        raise ValueError("expected https://: plain http:// is taken only for a loopback address")
    return bare


# -- how a new value is tried -----------------------------------------------------------------------------------------


def status_code(value: object) -> int:
    """The status of a whole HTTP answer."""
    if not is_number(value) or value not in range(200, 600):
        raise ValueError("expected a status of HTTP from 200 to 599, as a number")
    return int(value)


def header_name(value: object) -> str:
    """The name of an HTTP header that has nothing to do with how a message is framed or where it goes."""
    if not isinstance(value, str) or not _HEADER_NAME.fullmatch(value):
        raise ValueError("expected the name of a header, such as Authorization or X-Api-Key")
    if value.lower() in _FRAMING_HEADERS:
        raise ValueError("expected a header of its own: this one says how or where HTTP goes")
    return value


def header_template(value: object) -> Template:
    """What a header says, with at least one field of the credential: a header without one would try nothing."""
    given = text(value)
    parts = list(_TEMPLATE_PART.finditer(given))
    texts, fields = [""], list[str]()
    for part in parts:
        if part["field"] is not None:
            fields.append(part["field"])
            texts.append("")
        else:
            texts[-1] += {"{{": "{", "}}": "}"}.get(part["text"], part["text"])
    whole = sum(len(part[0]) for part in parts) == len(given)
    if not fields or not whole or not "".join(texts).isascii():
        raise ValueError(
            'expected ASCII text with a field of the credential in braces, such as "Bearer {api_key}"; a brace itself'
            " is written twice"
        )
    return Template(tuple(texts), tuple(fields))


def url(value: object) -> str:
    """`https://` and where, or `http://` of this very host. The credential goes in a header, so no user, no field."""
    given = text(value)
    found = _URL.fullmatch(given)
    if found is None:
        raise ValueError(_NO_URL)
    scheme, host, port = found.groups()
    if port and not 0 < int(port[1:]) < 65536:
        raise ValueError(_NO_URL)
    if scheme == "http" and not is_loopback(host):
        raise ValueError("expected https://: plain http:// is taken only for a loopback address")
    return given


def database_address(value: object) -> tuple[str, int, str]:
    """Host, port and database. The host is a name, an IP address, or a directory where a Unix socket is."""
    found = _DATABASE.fullmatch(text(value))
    if found is None:
        raise ValueError(
            'expected host:port/database, such as "db.acme.example:5432/ledger" or "/run/postgresql/ledger"'
        )
    host, port, database = found.groups()
    if port is not None and not 0 < int(port) < 65536:
        raise ValueError("expected a port from 1 to 65535")
    return absolute_path(host) if host.startswith("/") else host.strip("[]"), int(port or _POSTGRESQL_PORT), database


# -- selectors --------------------------------------------------------------------------------------------------------


def selector(value: object) -> Selector:
    """A selector whose value can hold for some process: they match exactly, so a wildcard never would."""
    parsed = Selector.parse(text(value))
    problem = _misfit(parsed)
    if problem:
        raise ValueError(f"expected {parsed.kind}:{problem}")
    return parsed


def _misfit(found: Selector) -> str:
    match found.kind:
        case "unix:uid" | "unix:gid" | "unix:supplementary_gid":
            fits = found.value.isascii() and found.value.isdecimal() and str(int(found.value[:11])) == found.value
            return "" if fits and int(found.value) < 2**32 - 1 else "NUMBER, in decimal"
        case "unix:path":
            return "" if _is_plain_path(found.value) and not _has_wildcard(found) else "/PATH, absolute, no wildcard"
        case "unix:sha256":
            return "" if _SHA256.fullmatch(found.value) else "HASH, 64 hexadecimal digits in lower case"
        case "systemd:unit":
            fits = found.value.endswith(_UNIT_SUFFIXES) and not _has_wildcard(found)
            return "" if fits else "UNIT with its suffix, such as billing.service, no wildcard"
        case "systemd:slice":
            fits = found.value.endswith(".slice") and not _has_wildcard(found)
            return "" if fits else "SLICE with its suffix, such as billing.slice, no wildcard"
        case _:
            return "VALUE without wildcard: selectors match exactly" if _has_wildcard(found) else ""


def _has_wildcard(found: Selector) -> bool:
    return "*" in found.value or "?" in found.value


def _is_plain_path(path: str) -> bool:
    return path.startswith("/") and path != "/" and posixpath.normpath(path) == path and not path.startswith("//")


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address, cannot be another machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
