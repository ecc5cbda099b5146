"""A short soak; `tests/soak.py` is the long one."""

from __future__ import annotations

from soak import L, Record, slope, soak


def test_steps_leave_nothing_behind_and_keep_the_codes_in_use() -> None:
    seen = soak(300, records=6)
    assert [record.step for record in seen] == [50, 100, 150, 200, 250, 300]
    assert len({record.tensors for record in seen[1:]}) == 1
    for record in seen:
        assert record.finite
        assert record.dead == 0
        assert record.perplexity > L / 2


def test_the_slope_is_bytes_a_step() -> None:
    seen = [Record(step, 1000 + 3 * step, 1.0, 0, 0, True) for step in range(0, 400, 50)]
    assert round(slope(seen), 6) == 3
