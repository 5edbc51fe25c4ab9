"""Learning-rate schedules and the draw that limits attention: functions of the step."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest

from megatron_fwpkm.config import UserError, load_train_config
from megatron_fwpkm.train.schedule import Schedule, build_schedule, limits_attention
from megatron_fwpkm.train.settings import OptimizerConfig

NANO = Path(__file__).parents[2] / "configs" / "train" / "nano.yaml"


def test_cosine_warms_up_then_falls_to_the_final_share() -> None:
    schedule = Schedule(peak=2.0, warmup_steps=4, steps=24, final_fraction=0.1)
    rates = [schedule.learning_rate(step) for step in range(1, 25)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[3:]))
    assert math.isclose(rates[13], 0.5 * (2.0 + 0.2))
    assert math.isclose(rates[-1], 0.2)
    assert Schedule(1.0, 0, 10, 0.0).learning_rate(1) < 1.0


@pytest.mark.parametrize(
    ("shape", "left"), [("linear", [0.75, 0.5, 0.25]), ("1-sqrt", [0.5, 1 - 0.5**0.5, 1 - 0.75**0.5])]
)
def test_wsd_warms_up_stays_and_falls(shape: str, left: list[float]) -> None:
    config = OptimizerConfig(
        learning_rate=2.0e-2,
        schedule="wsd",
        warmup_steps=5,
        final_fraction=0.2,
        wsd_decay_fraction=0.2,
        wsd_decay_shape=shape,  # type: ignore[arg-type]
    )
    schedule = build_schedule(config, 20)
    rates = [schedule.learning_rate(step) / 2.0e-2 for step in range(1, 21)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4:16] == [1.0] * 12
    assert rates[16:] == pytest.approx([*(0.2 + 0.8 * share for share in left), 0.2])


def test_wsd_may_have_no_stable_phase_and_no_warmup() -> None:
    schedule = build_schedule(OptimizerConfig(schedule="wsd", warmup_steps=0, wsd_decay_fraction=1.0), 4)
    assert schedule.learning_rate(1) < 3e-3 and schedule.learning_rate(4) == pytest.approx(3e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.warmup_steps=560"], "560 steps of warmup"),
        (["optimizer.schedule=wsd", "optimizer.wsd_decay_fraction=0.95"], "532 of decay don't fit into 560"),
        (["optimizer.schedule=wsd", "optimizer.wsd_decay_fraction=0"], "optimizer.wsd_decay_fraction"),
        (["optimizer.schedule=step"], "optimizer.schedule"),
        (["optimizer.wsd_decay_shape=cosine"], "optimizer.wsd_decay_shape"),
        (["optimizer.learning_rate=10", "optimizer.weight_decay=0.1"], "learning_rate .* must be below 1"),
        (["optimizer.pkm_values_learning_rate=20"], "pkm_values_learning_rate .* must be below 1"),
        (["optimizer.pkm_values_learning_rate=0"], "optimizer.pkm_values_learning_rate"),
        (["training.sliding_probability=1.5"], "training.sliding_probability"),
        (["training.precision=bf16", "training.zero_stage=0"], "training.zero_stage"),
        (["model.pkm_layers=[0]", "model.pkm.sparse_gradients=false"], "set model.pkm.sparse_gradients=true"),
    ],
)
def test_what_does_not_fit_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_train_config(NANO, overrides)


def test_limited_attention_is_drawn_by_seed_and_step() -> None:
    draws = [limits_attention(7, step, 0.25) for step in range(1, 4001)]
    assert draws == [limits_attention(7, step, 0.25) for step in range(1, 4001)]
    assert abs(sum(draws) / 4000 - 0.25) < 0.03
    assert draws != [limits_attention(8, step, 0.25) for step in range(1, 4001)]
    assert not any(limits_attention(7, step, 0.0) for step in range(1, 200))
    assert all(limits_attention(7, step, 1.0) for step in range(1, 200))
