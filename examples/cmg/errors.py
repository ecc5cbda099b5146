"""The error that unusable input raises, everywhere in the example."""

from __future__ import annotations


class DataError(ValueError):
    """Unusable input. The message is one line: where, the rule, the value it got, and a hint."""
