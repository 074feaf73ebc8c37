"""core.store: one decision per call, for every state that a credential can be in."""

from __future__ import annotations

from dataclasses import replace

from tests.making import instant, issued, kv_grant
from tokenward.core.model import Instant, Issued, Key, Policy, Served
from tokenward.core.store import Failed, Fetch, Hit, Lapse, Refresh, Retire, Store, Wait
from tokenward.errors import Reason, VaultUnavailableError

KEY = Key("app", "api")
GRANT = kv_grant(policy=Policy(overlap_s=10))
DOWN = VaultUnavailableError(Reason.VAULT_UNREACHABLE, "down")


def new_store() -> Store:
    return Store(margin_s=6)


def put(store: Store, value: Issued, now: Instant) -> tuple[Issued, ...]:
    return store.put(KEY, value, fingerprint="f", draw=0.5, now=now)


def holding(value: Issued) -> Store:
    store = new_store()
    assert isinstance(store.decide(KEY, GRANT, value.issued), Fetch)
    put(store, value, value.issued)
    return store


def hit(store: Store, at: float) -> Served:
    decision = store.decide(KEY, GRANT, instant(at))
    assert isinstance(decision, Hit)
    return decision.served


def refresh(store: Store, value: Issued) -> tuple[Issued, ...]:
    assert store.begin(KEY)
    return put(store, value, value.issued)


def test_the_first_caller_fetches_and_the_others_wait() -> None:
    store = new_store()
    assert isinstance(store.decide(KEY, GRANT, instant(0)), Fetch)
    assert isinstance(store.decide(KEY, GRANT, instant(0)), Wait)


def test_a_live_value_is_a_hit_up_to_its_end_and_then_fetched_anew() -> None:
    store = holding(issued(lifetime_s=100))
    assert hit(store, 99.9).current.number == 1
    assert isinstance(store.decide(KEY, GRANT, instant(100)), Fetch)


def test_an_expired_value_is_never_served_while_its_successor_is_on_the_way() -> None:
    store = holding(issued(lifetime_s=100))
    assert store.begin(KEY)
    assert hit(store, 99).current.number == 1
    assert isinstance(store.decide(KEY, GRANT, instant(100)), Wait)
    assert store.live(KEY, instant(100)) is None


def test_a_wall_bound_value_ends_by_the_wall_clock_too() -> None:
    store = holding(issued(lifetime_s=100, wall_bound=True))
    stepped = Instant(instant(100).wall, 10)
    assert isinstance(store.decide(KEY, GRANT, stepped), Fetch)


def test_a_leased_value_does_not_end_by_a_step_of_the_wall_clock() -> None:
    store = holding(issued(lifetime_s=100))
    assert isinstance(store.decide(KEY, GRANT, Instant(instant(500).wall, 10)), Hit)


def test_a_failure_without_a_value_is_shared_until_the_back_off_ends() -> None:
    store = new_store()
    store.decide(KEY, GRANT, instant(0))
    store.fail(KEY, DOWN, draw=1.0, now=instant(0))
    assert store.decide(KEY, GRANT, instant(0.4)) == Failed(DOWN, 0.5 - 0.4)
    assert isinstance(store.decide(KEY, GRANT, instant(0.5)), Fetch)


def test_a_failure_waits_as_long_as_the_vault_asked() -> None:
    store = new_store()
    store.decide(KEY, GRANT, instant(0))
    store.fail(
        KEY, VaultUnavailableError(Reason.VAULT_RATE_LIMITED, "slow", retry_after_s=20), draw=1.0, now=instant(0)
    )
    assert isinstance(store.decide(KEY, GRANT, instant(19)), Failed)


def test_a_failed_refresh_keeps_the_value_and_says_that_it_is_stale() -> None:
    store = holding(issued(lifetime_s=100))
    assert not hit(store, 66).stale
    store.begin(KEY)
    store.fail(KEY, DOWN, draw=1.0, now=instant(67))
    assert hit(store, 68).stale
    assert store.due(instant(67.4), ()) == ()
    assert store.due(instant(67.5), ()) == (Refresh(KEY),)
    refresh(store, issued(at=68, value="new"))
    assert not hit(store, 69).stale


def test_the_same_value_again_prolongs_the_version_and_keeps_its_draw() -> None:
    store = holding(issued(lifetime_s=100))
    first = hit(store, 1).current
    assert refresh(store, issued(lifetime_s=100, at=60)) == ()
    again = hit(store, 150).current
    assert (again.number, again.since, again.draw) == (first.number, first.since, first.draw)
    assert again.issued.expires == instant(160)


def test_a_new_value_is_the_next_version_and_the_old_one_overlaps() -> None:
    store = holding(issued(value="old"))
    assert refresh(store, issued(at=60, value="new")) == ()
    served = hit(store, 61)
    assert served.current.number == 2
    assert served.previous is not None
    assert served.previous.issued.values["password"].reveal() == "old"
    assert served.retire == instant(70)


def test_the_old_value_is_retired_when_the_overlap_ends() -> None:
    store = holding(old := issued(value="old"))
    refresh(store, issued(at=60, value="new"))
    assert store.next_due_mono() == 70
    assert store.due(instant(70), ()) == (Retire(KEY),)
    assert store.retire(KEY) == (old,)
    assert hit(store, 71).previous is None
    assert store.retire(KEY) == ()


def test_the_overlap_ends_with_the_old_value_itself() -> None:
    store = holding(issued(lifetime_s=100, value="old"))
    refresh(store, issued(at=95, value="new"))
    assert hit(store, 96).retire == instant(100)
    assert hit(store, 100).previous is None


def test_an_old_value_that_has_expired_is_revoked_at_once() -> None:
    store = holding(old := issued(lifetime_s=100, value="old"))
    assert isinstance(store.decide(KEY, GRANT, instant(101)), Fetch)
    assert put(store, issued(at=101, value="new"), instant(101)) == (old,)
    assert hit(store, 102).previous is None


def test_a_third_value_within_an_overlap_displaces_the_first() -> None:
    store = holding(first := issued(value="one"))
    refresh(store, issued(at=60, value="two"))
    assert refresh(store, issued(at=61, value="three")) == (first,)
    served = hit(store, 62)
    assert served.previous is not None
    assert (served.current.number, served.previous.number) == (3, 2)


def test_without_overlap_the_old_value_is_revoked_with_the_switch() -> None:
    store = new_store()
    grant = kv_grant(policy=Policy(overlap_s=0))
    store.decide(KEY, grant, instant(0))
    put(store, old := issued(value="old"), instant(0))
    assert refresh(store, issued(at=60, value="new")) == (old,)


def test_a_used_value_is_refreshed_when_due_for_the_first_time_earlier() -> None:
    store = holding(issued(lifetime_s=100))
    assert store.next_due_mono() == 50.25
    assert store.due(instant(50.2), ()) == ()
    assert store.due(instant(50.25), ()) == (Refresh(KEY),)
    refresh(store, issued(lifetime_s=100, at=60, value="new"))
    store.retire(KEY)
    assert store.next_due_mono() == 127


def test_a_second_failure_is_no_news() -> None:
    store = holding(issued(lifetime_s=100))
    told = []
    for at in (60, 61):
        store.begin(KEY)
        store.fail(KEY, DOWN, draw=0.5, now=instant(at))
        told.append(store.live(KEY, instant(at)))
    assert told[0] is not None
    assert told[0].stale
    assert told[1] is told[0]


def test_a_vault_that_says_when_to_come_again_is_obeyed_and_a_guess_is_not() -> None:
    for reason, wait_s in ((Reason.VAULT_RATE_LIMITED, 60), (Reason.VAULT_UNREACHABLE, 20)):
        store = holding(issued(lifetime_s=100))
        store.begin(KEY)
        error = VaultUnavailableError(reason, "no", retry_after_s=60)
        store.fail(KEY, error, draw=0.5, now=instant(60))
        assert store.next_due_mono() == 60 + wait_s


def test_when_the_vault_is_back_what_failed_is_tried_soon_and_each_at_its_own_time() -> None:
    store = new_store()
    keys = [Key("app", name) for name in ("one", "other", "limited")]
    errors = [DOWN, DOWN, VaultUnavailableError(Reason.VAULT_RATE_LIMITED, "slowly", retry_after_s=60)]
    for key, error in zip(keys, errors, strict=True):
        store.decide(key, GRANT, instant(0))
        for _ in range(9):
            store.fail(key, error, draw=0.9, now=instant(0))
    store.encourage(iter((0.25, 0.75)).__next__, instant(1))
    assert {task.key for task in store.due(instant(1.75), keys)} == {keys[0]}
    assert {task.key for task in store.due(instant(3.25), keys)} == set(keys[:2])


def test_what_expires_first_is_refreshed_first() -> None:
    store = new_store()
    keys = [Key("app", name) for name in ("late", "early", "between")]
    for key, lifetime_s in zip(keys, (100, 80, 90), strict=True):
        store.decide(key, GRANT, instant(0))
        store.put(key, issued(lifetime_s=lifetime_s), fingerprint="", draw=0.5, now=instant(0))
    assert [task.key.credential for task in store.due(instant(70), ())] == ["early", "between", "late"]


def test_a_value_that_the_vault_ended_is_not_served_and_its_successor_has_no_previous() -> None:
    store = holding(first := issued(lifetime_s=100))
    store.begin(KEY)
    assert store.void(KEY) == (first,)
    assert isinstance(store.decide(KEY, GRANT, instant(50)), Wait)
    put(store, issued(lifetime_s=100, at=50, value="new"), instant(50))
    served = hit(store, 51)
    assert (served.current.number, served.previous) == (2, None)


def test_what_one_agent_held_the_next_one_serves_and_counts_on() -> None:
    before = holding(issued(lifetime_s=100))
    refresh(before, issued(lifetime_s=100, at=50, value="new"))
    other = Key("app", "other")
    before.decide(other, GRANT, instant(0))
    before.put(other, issued(lifetime_s=10), fingerprint="", draw=0.5, now=instant(0))
    before.drop(other)
    (held,) = before.held(instant(51), lambda key: f"digest of {key}")
    assert held.grant_digest == f"digest of {KEY}"
    after = new_store()
    after.adopt(held, GRANT)
    after.count_on(before.numbers)
    assert hit(after, 52) == hit(before, 52)
    assert after.next_due_mono() == before.next_due_mono()
    after.decide(other, GRANT, instant(60))
    after.put(other, issued(at=60), fingerprint="", draw=0.5, now=instant(60))
    assert after.live(other, instant(60)).current.number == 2  # type: ignore[union-attr]  # it was put just now


def test_what_has_expired_is_not_handed_on_but_its_count_is() -> None:
    store = holding(issued(lifetime_s=100))
    assert store.held(instant(100), str) == ()
    store.begin(KEY)
    store.void(KEY)
    assert store.numbers == {KEY: 1}


def test_a_refresh_in_flight_is_not_due_again() -> None:
    store = holding(issued(lifetime_s=100))
    assert store.begin(KEY)
    assert not store.begin(KEY)
    assert store.due(instant(67), ()) == ()
    assert store.next_due_mono() is None


def test_a_value_that_nobody_asked_for_in_its_last_life_lapses() -> None:
    store = holding(issued(lifetime_s=100))
    store.begin(KEY)
    renewed = replace(issued(lifetime_s=100), renewed=instant(67), expires=instant(167))
    put(store, renewed, instant(67))
    assert store.due(instant(134), ()) == (Lapse(KEY),)


def test_a_watched_value_is_used_even_if_nobody_asks() -> None:
    store = holding(issued(lifetime_s=100))
    for at in (67, 134, 201):
        assert store.due(instant(at), {KEY}) == (Refresh(KEY),)
        store.begin(KEY)
        put(store, replace(issued(), renewed=instant(at), expires=instant(at + 100)), instant(at))
    assert store.due(instant(268), ()) == (Refresh(KEY),), "watched within its last life"


def test_a_failure_that_somebody_watches_is_tried_again_and_else_forgotten() -> None:
    store = new_store()
    store.decide(KEY, GRANT, instant(0))
    store.fail(KEY, DOWN, draw=1.0, now=instant(0))
    assert store.due(instant(1), {KEY}) == (Refresh(KEY),)
    assert store.due(instant(1), ()) == (Lapse(KEY),)


def test_an_expired_value_lapses_unless_it_is_watched() -> None:
    store = holding(issued(lifetime_s=100))
    assert store.due(instant(101), ()) == (Lapse(KEY),)
    assert store.due(instant(101), {KEY}) == (Refresh(KEY),)


def test_dropping_returns_everything_that_must_be_revoked() -> None:
    store = holding(old := issued(value="old"))
    refresh(store, new := issued(at=60, value="new"))
    assert store.drop_all() == {KEY: (old, new)}
    assert len(store) == 0
    assert store.drop(KEY) == ()
    assert store.next_due_mono() is None
    assert not store.begin(KEY)
    assert store.retire(KEY) == ()
    assert store.live(KEY, instant(0)) is None


def test_a_key_in_flight_without_a_value_needs_no_revocation() -> None:
    store = new_store()
    store.decide(KEY, GRANT, instant(0))
    assert store.drop_all() == {KEY: ()}


def test_two_answers_of_one_state_are_one_object() -> None:
    store = holding(issued())
    assert hit(store, 1) is hit(store, 2)


def test_an_overlap_can_be_made_to_end_sooner_but_never_later() -> None:
    store = holding(issued(value="old"))
    refresh(store, issued(at=60, value="new"))
    store.hasten(KEY, 2, grace_s=1, now=instant(62))
    assert hit(store, 62).retire == instant(63)
    store.hasten(KEY, 2, grace_s=5, now=instant(62))
    assert hit(store, 62).retire == instant(63)
    assert store.due(instant(63), ()) == (Retire(KEY),)


def test_an_overlap_is_not_hastened_for_another_version_or_when_there_is_none() -> None:
    store = holding(issued(value="old"))
    store.hasten(KEY, 1, grace_s=1, now=instant(1))
    assert hit(store, 1).retire is None
    refresh(store, issued(at=60, value="new"))
    for version in (1, 3):
        store.hasten(KEY, version, grace_s=1, now=instant(61))
    assert hit(store, 61).retire == instant(70)
    store.hasten(Key("app", "unknown"), 1, grace_s=1, now=instant(61))


def test_a_refused_version_is_looked_at_once_per_pause() -> None:
    store = holding(issued())
    assert store.may_look_again(KEY, 1, pause_s=10, now=instant(5))
    assert not store.may_look_again(KEY, 1, pause_s=10, now=instant(14.9))
    assert store.may_look_again(KEY, 1, pause_s=10, now=instant(15))


def test_a_version_that_is_not_current_or_on_its_way_out_is_not_looked_at() -> None:
    store = holding(issued())
    assert not store.may_look_again(KEY, 2, pause_s=10, now=instant(5))
    assert not store.may_look_again(Key("app", "unknown"), 1, pause_s=10, now=instant(5))
    store.begin(KEY)
    assert not store.may_look_again(KEY, 1, pause_s=10, now=instant(5))


def test_what_has_expired_is_no_live_value_and_asking_so_is_no_use_of_it() -> None:
    store = holding(issued(lifetime_s=100))
    assert store.live(KEY, instant(99)) is not None
    assert store.live(KEY, instant(100)) is None
    assert store.live(Key("app", "unknown"), instant(0)) is None


def test_a_key_names_its_audience_where_it_has_one() -> None:
    assert str(KEY) == "app/api"
    assert str(Key("app", "jwt", "https://api")) == "app/jwt for https://api"


def test_version_numbers_go_on_after_a_credential_was_let_go() -> None:
    store = holding(issued(value="one"))
    store.drop(KEY)
    assert isinstance(store.decide(KEY, GRANT, instant(200)), Fetch)
    put(store, issued(at=200, value="two"), instant(200))
    assert hit(store, 201).current.number == 2


def test_the_back_off_leaves_room_for_another_attempt_before_the_value_ends() -> None:
    store = holding(issued(lifetime_s=100))
    for _ in range(8):
        store.begin(KEY)
        store.fail(KEY, DOWN, draw=1.0, now=instant(90))
    assert store.next_due_mono() == 95
    store.begin(KEY)
    store.fail(KEY, DOWN, draw=1.0, now=instant(99.9))
    assert store.next_due_mono() == 99.9 + 0.5
    store.begin(KEY)
    limited = VaultUnavailableError(Reason.VAULT_RATE_LIMITED, "slow", retry_after_s=9)
    store.fail(KEY, limited, draw=1.0, now=instant(90))
    assert store.next_due_mono() == 99, "what the vault asks for is obeyed all the same"


def test_a_flight_that_came_to_nothing_leaves_what_is_held_and_can_begin_again() -> None:
    store = holding(issued(lifetime_s=100))
    store.begin(KEY)
    store.abort(KEY)
    assert store.keys == {KEY}
    assert not hit(store, 60).stale
    assert store.begin(KEY)
