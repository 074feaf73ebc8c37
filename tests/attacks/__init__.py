"""The attacker's suite: a real agent as a process of its own, and what is tried against it."""
