"""Whatever a vault sends, the answer is a typed reply or an error of ours that does not quote it."""

from __future__ import annotations

import json

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from tokenward.core.secret import Secret
from tokenward.errors import TokenwardError, VaultBadReplyError
from tokenward.vault.reply import Reply, decode, error_of, not_serving, seconds_of

MARK = "s3cret-mark"


class Login(msgspec.Struct):
    username: str
    password: Secret
    ttl: int = 0


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.just(MARK) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["data", "auth", "errors", "username", "password", "ttl", "metadata"]), inner)
    ),
    max_leaves=12,
)
bodies = st.binary(max_size=200) | st.builds(lambda value: json.dumps(value).encode(), values)


@given(bodies)
def test_a_body_is_a_reply_or_a_bad_reply(body: bytes) -> None:
    try:
        made = decode(body, Login)
    except VaultBadReplyError as error:
        assert MARK not in str(error)  # noqa: PT017 -- both outcomes are right, and only one has an error
    else:
        assert isinstance(made, Reply)
        assert made.data is None or isinstance(made.data.password, Secret)


@given(st.integers(100, 599), bodies)
def test_a_refusal_is_an_error_of_ours_without_the_vaults_words(status: int, body: bytes) -> None:
    made = error_of(status, body, what="GET a", retry_after_s=None)
    assert isinstance(made, TokenwardError)
    assert MARK not in f"{made}{made!r}{made.__cause__}"
    known = not_serving(status, body)
    assert known is None or MARK not in known[1]


@given(st.text())
def test_retry_after_is_a_sane_number_of_seconds_or_none(text: str) -> None:
    found = seconds_of(text)
    assert found is None or 0 <= found <= 3600
