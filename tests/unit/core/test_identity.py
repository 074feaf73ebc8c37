"""SPIFFE IDs and selectors: what is refused, and what text means."""

from __future__ import annotations

import pytest

from tokenward.core.identity import SELECTOR_TYPES, Selector, SpiffeId, verify_trust_domain


@pytest.mark.parametrize(
    "text",
    [
        "spiffe://acme.example/stripe-sync",
        "spiffe://10.0.0.1/a",
        "spiffe://a_b-c.d/A/b_c/d.e/...",
        "spiffe://" + "t" * 255 + "/" + "p" * (2048 - 255 - 10),
    ],
)
def test_a_spiffe_id_is_written_as_it_was_read(text: str) -> None:
    assert str(SpiffeId.parse(text)) == text


def test_scheme_and_trust_domain_are_compared_without_case_and_the_path_with() -> None:
    assert SpiffeId.parse("SPIFFE://Acme.Example/App") == SpiffeId.of("acme.example", "/App")
    assert SpiffeId.parse("spiffe://acme.example/App") != SpiffeId.parse("spiffe://acme.example/app")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "acme.example/app",
        "https://acme.example/app",
        "spiffe:/acme.example/app",
        "spiffe:///app",
        "spiffe://acme.example",
        "spiffe://acme.example/",
        "spiffe://acme.example/app/",
        "spiffe://acme.example//app",
        "spiffe://acme.example/./app",
        "spiffe://acme.example/../app",
        "spiffe://acme.example/%61pp",
        "spiffe://acme.example/app?x=1",
        "spiffe://acme.example/app#x",
        "spiffe://acme.example/app\n",
        "spiffe://acme.example/\u00e4pp",
        "spiffe://acme.example:443/app",
        "spiffe://user@acme.example/app",
        "spiffe://[::1]/app",
        "spiffe://\u212aelvin.example/app",  # the Kelvin sign, whose lower case is an ASCII k
        "spiffe://" + "t" * 256 + "/app",
        "spiffe://" + "t" * 255 + "/" + "p" * (2048 - 255 - 9),
    ],
)
def test_anything_else_is_no_spiffe_id(text: str) -> None:
    with pytest.raises(ValueError, match=r"SPIFFE ID|trust domain"):
        SpiffeId.parse(text)


@pytest.mark.parametrize("path", ["", "app", "x/app"])
def test_a_path_without_its_slash_is_refused_and_never_becomes_part_of_the_trust_domain(path: str) -> None:
    with pytest.raises(ValueError, match="slash"):
        SpiffeId.of("acme.example", path)


def test_a_trust_domain_is_taken_as_it_is() -> None:
    verify_trust_domain("acme.example")
    with pytest.raises(ValueError, match="trust domain"):
        verify_trust_domain("Acme.example")


@pytest.mark.parametrize("kind", sorted(SELECTOR_TYPES))
def test_every_selector_type_is_written_as_it_was_read(kind: str) -> None:
    selector = Selector.parse(f"{kind}:a:b/c@d e")
    assert (selector.kind, selector.value) == (kind, "a:b/c@d e")
    assert str(selector) == f"{kind}:a:b/c@d e"


@pytest.mark.parametrize(
    "text", ["", "unix", "unix:pid:1", "unix:uid", "unix:uid:", "uid:1", ":unix:uid:1", "UNIX:uid:1"]
)
def test_a_selector_of_an_unknown_type_or_without_a_value_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="selector"):
        Selector.parse(text)
