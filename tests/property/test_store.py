"""core.store, whatever happens in whatever order: nothing expired is served, nothing is lost, nothing revoked twice."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.making import instant, issued, kv_grant
from tokenward.core.model import Instant, Issued, Key, Policy
from tokenward.core.store import Failed, Fetch, Hit, Lapse, Refresh, Retire, Store, Wait
from tokenward.errors import Reason, VaultUnavailableError

KEYS = [Key("app", name) for name in ("one", "two")]
GRANT = kv_grant(policy=Policy(overlap_s=10))
keys = st.sampled_from(KEYS)
draws = st.floats(0, 1, exclude_max=True)


class StoreMachine(RuleBasedStateMachine):
    """Callers, refreshes, failures and time, with a ledger of what exists at the vault."""

    def __init__(self) -> None:
        super().__init__()
        self.store = Store(margin_s=6)
        self.mono = 0.0
        self.flying: set[Key] = set()
        self.made = 0
        self.alive: dict[str, Issued] = {}

    @property
    def now(self) -> Instant:
        return instant(self.mono)

    @rule(seconds=st.floats(0, 60))
    def time_passes(self, seconds: float) -> None:
        self.mono += seconds

    @rule(key=keys)
    def somebody_asks(self, key: Key) -> None:
        decision = self.store.decide(key, GRANT, self.now)
        match decision:
            case Hit(served):
                assert served.current.issued.is_live(self.now)
                assert served.previous is None or served.previous.issued.is_live(self.now)
                assert (served.previous is None) == (served.retire is None)
                if served.previous is not None:
                    assert served.previous.number < served.current.number
            case Fetch():
                assert key not in self.flying
                self.flying.add(key)
            case Wait():
                assert key in self.flying
            case Failed(_, retry_after_s):
                assert retry_after_s > 0

    @rule(key=keys, lifetime_s=st.floats(1, 100), draw=draws)
    def a_flight_brings_a_value(self, key: Key, lifetime_s: float, draw: float) -> None:
        if key in self.flying:
            self.flying.discard(key)
            self.made += 1
            value = issued(lifetime_s=lifetime_s, at=self.mono, value=f"v{self.made}", leased=True)
            self.alive[f"v{self.made}"] = value
            self.revoke(self.store.put(key, value, fingerprint="", draw=draw, now=self.now))

    @rule(key=keys, draw=draws)
    def a_flight_fails(self, key: Key, draw: float) -> None:
        if key in self.flying:
            self.flying.discard(key)
            before = self.store.live(key, self.now)
            self.store.fail(key, VaultUnavailableError(Reason.VAULT_ERROR, "x"), draw=draw, now=self.now)
            after = self.store.live(key, self.now)
            assert (before is None) == (after is None), "a failure neither ends nor makes a value"

    @rule(watched=st.sets(keys))
    def the_refresher_runs(self, watched: set[Key]) -> None:
        for task in self.store.due(self.now, watched):
            assert task.key not in self.flying
            match task:
                case Refresh(key):
                    assert self.store.begin(key)
                    self.flying.add(key)
                case Retire(key):
                    self.revoke(self.store.retire(key))
                case Lapse(key):
                    assert key not in watched
                    self.revoke(self.store.drop(key))
        next_mono = self.store.next_due_mono()
        assert next_mono is None or next_mono > self.mono, "nothing is due twice"

    def revoke(self, ended: tuple[Issued, ...]) -> None:
        for each in ended:
            del self.alive[each.values["password"].reveal()]

    @invariant()
    def what_lives_at_the_vault_is_held(self) -> None:
        """Everything that was made and not given back to be revoked can still be reached through the store."""
        held = set()
        for entry in self.store._entries.values():
            for version in (entry.current, entry.previous):
                if version is not None:
                    held.add(version.issued.values["password"].reveal())
        assert held == self.alive.keys()


StoreMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestStore = StoreMachine.TestCase
