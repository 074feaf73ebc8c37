"""The bench of faults: a real agent on a real vault, something in between or at the end that goes wrong, and a count of
what callers saw of it."""
