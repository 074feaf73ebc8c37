"""Generated from `protos/tokenward/v1`; `python -m tests.generate` makes it anew, and a test finds drift."""
