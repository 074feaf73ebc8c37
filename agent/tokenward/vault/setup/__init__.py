"""What a vault needs for a configuration: `plan` says it, `render` prints it, `apply` makes it so.

The set-up of `tokenward vault-setup`, of the embedded vault and of the tests: one code for the three.
"""

from tokenward.vault.setup.applier import Change, Outcome, apply, render, revoke_admin
from tokenward.vault.setup.planner import plan
from tokenward.vault.setup.steps import ByHand, Plan, Step, agent_spiffe_id, policy_name

__all__ = [
    "ByHand",
    "Change",
    "Outcome",
    "Plan",
    "Step",
    "agent_spiffe_id",
    "apply",
    "plan",
    "policy_name",
    "render",
    "revoke_admin",
]
