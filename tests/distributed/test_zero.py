"""Training under every ZeRO stage, with split layers, divided tokens and sublayers computed again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import TinyJob

pytestmark = pytest.mark.distributed

LIMITS = {"fp64": 1e-12, "fp32": 2e-5}
BF16_LIMITS = {"losses": 2e-3, "gradients": 0.2}


@pytest.mark.parametrize(("processes", "layouts"), [(2, ("2sr",)), (4, ("2sb",))])
def test_every_stage_equals_plain_torch(tiny_job: TinyJob, processes: int, layouts: tuple[str, ...]) -> None:
    """Losses, global norms, gradients before the optimizer, weights after AdamW; a step that is not finite is skipped.

    In bf16 rounding hides the rest: there the stages agree with each other, whose sums and weights are float32, and
    only losses and first gradients are held to plain torch.
    """
    found = tiny_job.worker("zero_checks.py", *layouts, processes=processes)
    assert len(found) == 11 * len(layouts)
    for name, errors in found.items():
        assert errors.pop("applied") == 0 and errors.pop("skipped") == 0, name
        precision = name.split()[-1]
        if precision in LIMITS:
            assert set(errors) == {"losses", "norms", "gradients", "weights"}
            assert max(errors.values()) < LIMITS[precision], (name, errors)
        else:
            assert all(errors[key] < limit for key, limit in BF16_LIMITS.items()), (name, errors)
        if precision == "bf16":
            assert errors["clipping"] == 0 and errors["rounding"] == 0, name
            of_stages = [errors[f"{what} of stages"] for what in ("gradients", "masters", "norms")]
            assert max(of_stages) < 1e-6, (name, of_stages)
