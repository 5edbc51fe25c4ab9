"""The touched-row update against torch's AdamW, a dense reference and plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_fwpkm.train.touched_rows import RowGradient, RowSettings, TouchedRows, sum_row_gradients
from megatron_fwpkm.train.touched_rows_reference import DenseReference

SETTINGS = RowSettings(betas=(0.9, 0.95), epsilon=1e-8, weight_decay=0.1)
RATES = [3e-3, 1e-2, 7e-3, 2e-3, 5e-2, 1e-3, 4e-3, 9e-3]


def random_touches(rows: int, steps: int) -> list[Tensor]:
    """For each step the touched rows, bool [rows]: each in a third of the steps, the last one never, all in step 4."""
    touches = [torch.rand(rows) < 0.3 for _ in range(steps)]
    touches[3] = torch.ones(rows, dtype=torch.bool)
    for touched in touches:
        touched[-1] = False
    return touches


def as_rows(gradient_ND: Tensor, touched_N: Tensor) -> RowGradient:
    rows = touched_N.nonzero().view(-1)
    return RowGradient(rows, gradient_ND[rows])


@pytest.mark.parametrize("weight_decay", [0.1, 0.0])
def test_with_all_rows_touched_it_is_torch_adamw(weight_decay: float) -> None:
    table = torch.randn(7, 5, dtype=torch.float64)
    parameter = torch.nn.Parameter(table.clone())
    dense = torch.optim.AdamW([parameter], betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay, foreach=False)
    rows = TouchedRows(table, RowSettings((0.9, 0.95), 1e-8, weight_decay))
    for rate in RATES:
        parameter.grad = torch.randn_like(table)
        rows.update(RowGradient(torch.arange(7), parameter.grad.clone()), rate)
        dense.param_groups[0]["lr"] = rate
        dense.step()
        torch.testing.assert_close(table, parameter.detach(), rtol=1e-14, atol=1e-15)
    state = dense.state[parameter]
    assert torch.equal(rows.first_moment_ND, state["exp_avg"])
    assert torch.equal(rows.second_moment_ND, state["exp_avg_sq"])


def test_random_touches_equal_the_dense_reference_exactly() -> None:
    table = torch.randn(40, 6, dtype=torch.float64)
    reference = DenseReference(table, SETTINGS)
    rows = TouchedRows(table, SETTINGS)
    for rate, touched in zip(RATES * 3, random_touches(40, 24), strict=True):
        gradient = torch.randn(40, 6, dtype=torch.float64)
        rows.update(as_rows(gradient, touched), rate)
        reference.update(gradient, touched, rate)
        assert torch.equal(table, reference.table_ND)
    assert torch.equal(rows.first_moment_ND, reference.first_ND)
    assert torch.equal(rows.second_moment_ND, reference.second_ND)
    assert torch.equal(rows.updates_N.double(), reference.updates_N)
    assert rows.updates_N[-1] == 0 and (rows.updates_N[:-1] > 1).all() and len(set(rows.updates_N.tolist())) > 3
    settled = reference.settled_ND()
    rows.settle()
    assert torch.equal(table, settled) and rows.settles == 1
    rows.settle()
    assert torch.equal(table, settled)


def test_decay_and_bias_correction_by_plain_loops() -> None:
    """Each row for itself, decayed in every step: what the lazy clock must amount to once settled."""
    start = torch.randn(5, 3, dtype=torch.float64)
    table = start.clone()
    rows = TouchedRows(table, SETTINGS)
    value, first, second = start.tolist(), [[0.0] * 3 for _ in range(5)], [[0.0] * 3 for _ in range(5)]
    updates = [0] * 5
    for rate, touched in zip(RATES, random_touches(5, len(RATES)), strict=True):
        gradient = torch.randn(5, 3, dtype=torch.float64)
        rows.update(as_rows(gradient, touched), rate)
        for i in range(5):
            value[i] = [x * (1 - rate * 0.1) for x in value[i]]
            if not touched[i]:
                continue
            updates[i] += 1
            for d in range(3):
                g = float(gradient[i, d])
                first[i][d] = 0.9 * first[i][d] + 0.1 * g
                second[i][d] = 0.95 * second[i][d] + 0.05 * g * g
                mean, square = first[i][d] / (1 - 0.9 ** updates[i]), second[i][d] / (1 - 0.95 ** updates[i])
                value[i][d] -= rate * mean / (math.sqrt(square) + 1e-8)
    # Missed decay of a row acts before its update either way, so settling late changes roundings only.
    rows.settle()
    torch.testing.assert_close(table, torch.tensor(value, dtype=torch.float64), rtol=1e-13, atol=1e-14)


def test_untouched_rows_stay_bitwise_and_an_empty_step_moves_the_clock_only() -> None:
    table = torch.randn(6, 4)
    rows = TouchedRows(table, SETTINGS)
    rows.update(RowGradient(torch.tensor([1, 4]), torch.randn(2, 4)), 1e-2)
    before = {name: value.clone() for name, value in rows.state_dict().items() if isinstance(value, Tensor)}
    clock = rows.clock
    rows.update(rows.no_gradient(), 1e-2)
    assert rows.clock == clock + math.log1p(-1e-3)
    assert all(torch.equal(before[name], rows.state_dict()[name]) for name in before)
    rows.update(RowGradient(torch.tensor([0]), torch.randn(1, 4)), 1e-2)
    for name, tensor in before.items():
        assert torch.equal(tensor[1:], rows.state_dict()[name][1:])
        assert not torch.equal(tensor[0], rows.state_dict()[name][0])


def test_narrow_tables_add_up_small_updates_in_float32() -> None:
    start = torch.ones(3, 2, dtype=torch.bfloat16)
    table = start.clone()
    rows = TouchedRows(table, RowSettings((0.9, 0.95), 1e-8, 0.0))
    for _ in range(20):  # each is a quarter of the distance to the next smaller bfloat16
        rows.update(RowGradient(torch.tensor([1]), torch.ones(1, 2)), 1e-3)
    assert rows.master_ND.dtype == torch.float32
    torch.testing.assert_close(rows.master_ND[1], torch.full((2,), 0.98))
    assert torch.equal(table, rows.master_ND.bfloat16())
    assert torch.equal(table[::2], start[::2]) and not torch.equal(table[1], start[1])


def test_gradients_add_up_by_row_in_a_fixed_order() -> None:
    parts = [
        RowGradient(torch.tensor([0, 3, 7]), torch.randn(3, 4)),
        RowGradient(torch.tensor([], dtype=torch.int64), torch.empty(0, 4)),
        RowGradient(torch.tensor([3, 5, 7]), torch.randn(3, 4)),
        RowGradient(torch.tensor([3]), torch.randn(1, 4)),
    ]
    total = sum_row_gradients(parts)
    assert total.rows_U.tolist() == [0, 3, 5, 7]
    expected = [part.gradient_UD for part in parts]
    assert torch.equal(total.gradient_UD[1], expected[0][1] + expected[2][0] + expected[3][0])
    assert torch.equal(total.gradient_UD[0], expected[0][0])
    assert torch.equal(total.gradient_UD[3], expected[0][2] + expected[2][2])
    assert sum_row_gradients([parts[1], parts[1]]).rows_U.numel() == 0


def test_state_of_another_shape_is_refused_and_changes_nothing() -> None:
    rows = TouchedRows(torch.randn(6, 4), SETTINGS)
    rows.update(RowGradient(torch.tensor([2]), torch.randn(1, 4)), 1e-2)
    before = rows.master_ND.clone()
    other = TouchedRows(torch.randn(6, 3), SETTINGS).state_dict()
    with pytest.raises(ValueError, match=r"shape \(6, 3\)"):
        rows.load_state_dict(other)
    assert torch.equal(rows.master_ND, before) and rows.clock != 0.0
