"""Finds out before a run starts whether it can: `checks.preflight` asks, the others know.

Nothing is written, started or downloaded here (docs/decisions/0019-preflight.md).
"""
