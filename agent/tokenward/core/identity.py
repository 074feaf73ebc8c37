"""Names of workloads and of facts about processes: SPIFFE IDs and selectors.

Pure values, parsed once at the border and trusted afterwards.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

_TRUST_DOMAIN = re.compile(r"[a-z0-9._-]{1,255}")
_SEGMENT = re.compile(r"[A-Za-z0-9._-]+")
_MAX_ID_BYTES = 2048


@dataclass(frozen=True, slots=True)
class SpiffeId:
    """A SPIFFE ID with a path, such as `spiffe://acme.example/stripe-sync`.

    Follows SPIFFE-ID sections 2.1 to 2.4: lower-case trust domain of letters, digits, dots, dashes and underscores;
    path segments of the same and upper-case letters, none of them empty, `.` or `..`; 2048 bytes in all.
    """

    trust_domain: str
    path: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError, naming the rule that the text breaks."""
        scheme, separator, rest = text.partition("://")
        if scheme.lower() != "spiffe" or not separator:
            raise ValueError("a SPIFFE ID begins with spiffe://")
        trust_domain, _, path = rest.partition("/")
        if trust_domain.isascii():  # other letters may fall into ASCII when lowered, such as the Kelvin sign
            trust_domain = trust_domain.lower()
        return cls.of(trust_domain, "/" + path)

    @classmethod
    def of(cls, trust_domain: str, path: str) -> Self:
        """The ID of `path` (with its leading slash) in `trust_domain`. Raises ValueError."""
        verify_trust_domain(trust_domain)
        root, *segments = path.split("/")
        if root or not segments:
            raise ValueError("a SPIFFE ID's path begins with a slash")
        for segment in segments:
            if segment in {".", ".."} or not _SEGMENT.fullmatch(segment):
                raise ValueError("a SPIFFE ID's path has segments of A-Z a-z 0-9 . _ -, none empty, '.' or '..'")
        made = cls(trust_domain, path)
        if len(str(made)) > _MAX_ID_BYTES:
            raise ValueError(f"a SPIFFE ID has at most {_MAX_ID_BYTES} bytes")
        return made

    def __str__(self) -> str:
        return f"spiffe://{self.trust_domain}{self.path}"


def verify_trust_domain(text: str) -> None:
    """Raises ValueError unless `text` is a trust domain name (SPIFFE-ID section 2.1)."""
    if not _TRUST_DOMAIN.fullmatch(text):
        raise ValueError("a trust domain has 1 to 255 of a-z 0-9 . _ -, nothing else")


SELECTOR_TYPES = frozenset(
    {
        "unix:uid",
        "unix:user",
        "unix:gid",
        "unix:group",
        "unix:supplementary_gid",
        "unix:path",
        "unix:sha256",
        "systemd:unit",
        "systemd:slice",
        "k8s:pod-uid",
        "k8s:ns",
        "k8s:sa",
        "k8s:container-id",
        "container:id",
        "lsm:label",
    }
)


@dataclass(frozen=True, slots=True, order=True)
class Selector:
    """One fact about a process or its platform, written `type:key:value` as SPIRE writes them: `unix:uid:1001`."""

    kind: str
    """Type and key, a member of `SELECTOR_TYPES`: `unix:uid`."""
    value: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError when the type is unknown or the value is empty."""
        parts = text.split(":", 2)
        kind = ":".join(parts[:2])
        if kind not in SELECTOR_TYPES:
            raise ValueError(f"unknown selector type {kind!r}; known are {', '.join(sorted(SELECTOR_TYPES))}")
        if len(parts) < 3 or not parts[2]:
            raise ValueError(f"selector {kind!r} needs a value after it: {kind}:VALUE")
        return cls(kind, parts[2])

    def __str__(self) -> str:
        return f"{self.kind}:{self.value}"
