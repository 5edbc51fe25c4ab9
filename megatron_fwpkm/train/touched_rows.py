"""AdamW on the touched rows of a table: nothing in a step costs O(N) (docs/semantics.md, section H).

A PKM layer reads few of its N value rows in a step, and only those have a gradient. For the rows that were read:

    V_i  <- (product of the decay factors 1 - rate * decay of all steps since the row's last update) * V_i
    m_i  <- b1 m_i + (1 - b1) g_i            v_i <- b2 v_i + (1 - b2) g_i^2
    c_i  <- c_i + 1                          the row's own number of updates
    V_i  <- V_i - rate * (m_i / (1 - b1^c_i)) / (sqrt(v_i / (1 - b2^c_i)) + eps)

Other rows, their moments and counts stay. Where every row is touched in every step this is torch.optim.AdamW.
`touched_rows_reference.py` is the same, dense and obvious.

Letters: N rows of the table, D width, U touched rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fwpkm_kernels import plan_slots, scatter_weighted_add

_TENSORS = ("first_moment_ND", "second_moment_ND", "updates_N", "clock_N")


@dataclass(frozen=True)
class RowSettings:
    """Constants of the update, as torch.optim.AdamW has them."""

    betas: tuple[float, float]
    epsilon: float
    weight_decay: float


@dataclass(frozen=True)
class RowGradient:
    """Gradient of a table: distinct rows in ascending order, int64 [U], and their gradients [U, D]."""

    rows_U: Tensor
    gradient_UD: Tensor


def sum_row_gradients(parts: Sequence[RowGradient]) -> RowGradient:
    """Add gradients of the same table. Each row's terms are added in the order of `parts`: the same bits everywhere."""
    if len(parts) == 1:
        return parts[0]
    rows, gradient = torch.cat([p.rows_U for p in parts]), torch.cat([p.gradient_UD for p in parts])
    if rows.numel() == 0:
        return RowGradient(rows, gradient)
    plan = plan_slots(rows.unsqueeze(1))
    return RowGradient(plan.slots_U, scatter_weighted_add(plan.segments, gradient, gradient.new_ones(len(rows), 1)))


class TouchedRows:
    """The optimizer of one table.

    Args:
        values: the table [N, D], which no other optimizer has
        settings: constants of the update

    Decay is lazy. Every applied step moves one clock, the sum of the logarithms of all decay factors so far, and each
    row remembers the clock of its last update; the difference is the decay that it has missed. Reads between two
    updates of a row see it without the missed decay, until `settle`.

    Attributes:
        clock: sum of log(1 - rate * decay) over all applied steps
        settles: number of calls of `settle`, the only operation that costs O(N)
    """

    def __init__(self, values: Tensor, settings: RowSettings) -> None:
        self._values = values
        self._settings = settings
        wide = values.dtype in (torch.float32, torch.float64)
        # A table of narrow numbers would lose most updates to rounding: they go to a float32 copy and are rounded last.
        self._master_ND = None if wide else values.detach().float()
        self.first_moment_ND = torch.zeros_like(self.master_ND)
        self.second_moment_ND = torch.zeros_like(self.master_ND)
        self.updates_N = torch.zeros(len(values), dtype=torch.int64, device=values.device)
        self.clock_N = torch.zeros(len(values), dtype=torch.float64, device=values.device)
        self.clock = 0.0
        self.settles = 0

    @property
    def master_ND(self) -> Tensor:
        """The table in the precision that updates have: a float32 copy of a narrower one, otherwise itself."""
        return self._values.detach() if self._master_ND is None else self._master_ND

    def row_gradient(self, gradient_ND: Tensor) -> RowGradient:
        """A sparse gradient that autograd made, in the precision of updates. Raises RuntimeError for a dense one."""
        if not gradient_ND.is_sparse:
            raise RuntimeError("the gradient of a trained table must be sparse: PKMConfig.sparse_gradients")
        gradient_ND = gradient_ND.coalesce()
        return RowGradient(gradient_ND.indices()[0], gradient_ND.values().to(self.master_ND.dtype))

    def no_gradient(self) -> RowGradient:
        """The gradient of a step in which no row was read."""
        return RowGradient(self.updates_N.new_empty(0), self.master_ND.new_empty(0, self.master_ND.shape[1]))

    @torch.no_grad()
    def update(self, gradient: RowGradient, learning_rate: float) -> None:
        """One step. Costs the touched rows; a step in which none was touched still moves the clock."""
        (beta1, beta2), rows, dtype = self._settings.betas, gradient.rows_U, self.master_ND.dtype
        shrink = learning_rate * self._settings.weight_decay
        clock_before = self.clock
        self.clock += math.log1p(-shrink)
        if rows.numel() == 0:
            return
        # exp(0) is 1: a row that missed no step decays exactly as AdamW has it.
        decay_U = torch.exp(clock_before - self.clock_N.index_select(0, rows)) * (1 - shrink)
        updates_U = self.updates_N.index_select(0, rows) + 1
        first_UD = self.first_moment_ND.index_select(0, rows).lerp_(gradient.gradient_UD, 1 - beta1)
        second_UD = self.second_moment_ND.index_select(0, rows).mul_(beta2)
        second_UD.addcmul_(gradient.gradient_UD, gradient.gradient_UD, value=1 - beta2)
        step_U = -learning_rate / (1 - beta1 ** updates_U.double())
        root_U = (1 - beta2 ** updates_U.double()).sqrt()
        denominator_UD = (second_UD.sqrt() / root_U.to(dtype).unsqueeze(1)).add_(self._settings.epsilon)
        rows_UD = self.master_ND.index_select(0, rows).mul_(decay_U.to(dtype).unsqueeze(1))
        rows_UD.addcdiv_(first_UD * step_U.to(dtype).unsqueeze(1), denominator_UD)
        self.master_ND.index_copy_(0, rows, rows_UD)
        self.first_moment_ND.index_copy_(0, rows, first_UD)
        self.second_moment_ND.index_copy_(0, rows, second_UD)
        self.updates_N.index_copy_(0, rows, updates_U)
        self.clock_N.index_fill_(0, rows, self.clock)
        if self._master_ND is not None:
            self._values.detach().index_copy_(0, rows, rows_UD.to(self._values.dtype))

    @torch.no_grad()
    def settle(self) -> None:
        """Give all rows the decay that they have missed, as before an export. O(N), counted in `settles`."""
        self.master_ND.mul_(torch.exp(self.clock - self.clock_N).to(self.master_ND.dtype).unsqueeze(1))
        self.clock_N.fill_(self.clock)
        self.settles += 1
        self._round()

    def _round(self) -> None:
        if self._master_ND is not None:
            self._values.detach().copy_(self._master_ND)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bitwise resume needs, by reference: the table, moments, counts and clocks."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        return {"master_ND": self.master_ND, **tensors, "clock": self.clock}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over (copy) a state. Raises ValueError when shapes or dtypes differ; nothing changes then."""
        own = {name: getattr(self, name) for name in ("master_ND", *_TENSORS)}
        for name, tensor in own.items():
            other = state[name]
            if other.shape != tensor.shape or other.dtype != tensor.dtype:
                raise ValueError(
                    f"{name} has shape {tuple(other.shape)} ({other.dtype}), this table {tuple(tensor.shape)} "
                    f"({tensor.dtype})"
                )
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self.clock = float(state["clock"])
        self._round()
