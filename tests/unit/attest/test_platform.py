"""attest.platform: the pod's own token names the namespace and the service account of every caller in the pod."""

from __future__ import annotations

import jwt
import pytest

from tokenward.attest.platform import platform_of

KEY = "k" * 32


def token(claims: dict[str, object]) -> str:
    return jwt.encode(claims, KEY, algorithm="HS256")


def test_namespace_and_service_account_come_from_the_tokens_own_claims() -> None:
    pod = {"namespace": "prod", "serviceaccount": {"name": "billing", "uid": "u"}, "pod": {"name": "p", "uid": "q"}}
    found = platform_of(token({"sub": "system:serviceaccount:prod:billing", "kubernetes.io": pod}))
    assert sorted(map(str, found.selectors)) == ["k8s:ns:prod", "k8s:sa:billing"]
    assert not found.unreadable


@pytest.mark.parametrize(
    "text",
    ["", "garbage", "a.b.c", token({"sub": "x"}), token({"kubernetes.io": "prod"}), token({"kubernetes.io": {}})],
)
def test_a_token_of_another_kind_leaves_the_platform_unknown_and_says_why(text: str) -> None:
    found = platform_of(text)
    assert not found.selectors
    assert set(found.unreadable) == {"k8s:ns", "k8s:sa"}
