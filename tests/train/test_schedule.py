"""Learning rates over a run."""

from __future__ import annotations

import pytest

from namr_dist.config import OptimConfig
from namr_dist.train.schedule import lr_factor


def test_warmup_then_half_a_cosine() -> None:
    config = OptimConfig(steps=110, warmup_steps=10)
    factors = [lr_factor(step, config) for step in range(110)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == 1 and factors[60] == pytest.approx(0.5) and 0 < factors[-1] < 1e-3
    assert all(later <= earlier for earlier, later in zip(factors[9:], factors[10:], strict=False))


def test_steps_down() -> None:
    config = OptimConfig(
        steps=100, warmup_steps=0, schedule="step", step_at=(0.5, 0.8), step_factor=0.1
    )
    assert [lr_factor(step, config) for step in (0, 49, 50, 79, 80, 99)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )
