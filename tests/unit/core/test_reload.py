"""core.reload: which values a new configuration ends."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.making import kv_grant, workload
from tokenward.core.model import Key, Policy, TokenRole, Workload
from tokenward.core.reload import changes, grant_of

APP = workload(grants={"api": kv_grant(), "db": kv_grant("db")})


def test_nothing_changed() -> None:
    found = changes({"app": APP}, {"app": workload(grants={"api": kv_grant(), "db": kv_grant("db")})})
    assert not found.workloads | found.ended


def test_a_new_workload_and_a_new_grant_end_nothing() -> None:
    more = workload(grants={**APP.grants, "new": kv_grant("new")})
    found = changes({"app": APP}, {"app": more, "other": workload("other")})
    assert found.workloads == {"app", "other"}
    assert not found.ended


def test_a_changed_grant_ends_alone() -> None:
    after = workload(grants={**APP.grants, "db": kv_grant("db", policy=Policy(max_ttl_s=60))})
    found = changes({"app": APP}, {"app": after})
    assert found.workloads == {"app"}
    assert found.ended == {("app", "db")}


@pytest.mark.parametrize(
    "after",
    [
        None,
        replace(APP, exchange=TokenRole(role="app")),
        replace(APP, selectors=workload("app", "unix:uid:7").selectors),
        replace(APP, spiffe_id=workload("other").spiffe_id),
    ],
    ids=["gone", "another exchange", "other selectors", "another SPIFFE ID"],
)
def test_a_workload_that_is_gone_or_proved_otherwise_ends_with_all_it_has(after: Workload | None) -> None:
    found = changes({"app": APP}, {} if after is None else {"app": after})
    assert found.ended == {("app", "api"), ("app", "db")}


def test_what_is_for_people_ends_nothing() -> None:
    found = changes({"app": APP}, {"app": replace(APP, owner="payments", purpose="another")})
    assert found.workloads == {"app"}
    assert not found.ended


def test_a_key_stands_for_a_grant_while_there_is_one() -> None:
    assert grant_of({"app": APP}, Key("app", "api")) == (APP, kv_grant())
    assert grant_of({"app": APP}, Key("app", "nope")) is None
    assert grant_of({}, Key("app", "api")) is None
