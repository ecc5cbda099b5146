"""The same draws on every run, and as many as keep the whole folder quick."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("mmvq", derandomize=True, deadline=None, max_examples=5, database=None)
settings.load_profile("mmvq")
