"""Figures of this agent beside `bao proxy`, taken from real runs: `python -m bench`."""
