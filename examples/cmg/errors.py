"""The one error that bad input raises anywhere in the example."""

from __future__ import annotations


class DataError(ValueError):
    """Input that cannot be used. Its message is one line: where, the rule, what came, a hint."""
