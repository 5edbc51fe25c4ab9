"""The update of `touched_rows.py`, dense and obvious: every row of every tensor in every step. For tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_fwpkm.train.touched_rows import RowSettings


class DenseReference:
    """AdamW over a table [N, D] in which only the touched rows move; O(N) throughout.

    Attributes:
        table_ND, first_ND, second_ND: the table and its moments
        updates_N: float64, each row's own number of updates
        clock_N: float64, sum of log(1 - rate * decay) over the steps up to each row's last update
    """

    def __init__(self, table_ND: Tensor, settings: RowSettings) -> None:
        self.settings = settings
        self.table_ND = table_ND.clone()
        self.first_ND, self.second_ND = torch.zeros_like(table_ND), torch.zeros_like(table_ND)
        self.updates_N = torch.zeros(len(table_ND), dtype=torch.float64)
        self.clock_N = torch.zeros(len(table_ND), dtype=torch.float64)
        self.clock = 0.0

    def update(self, gradient_ND: Tensor, touched_N: Tensor, learning_rate: float) -> None:
        """One step with a dense gradient; `touched_N` [N] bool tells the rows that were read."""
        (beta1, beta2), decay = self.settings.betas, self.settings.weight_decay
        touched_N1 = touched_N.unsqueeze(1)
        missed_N = torch.exp(self.clock - self.clock_N)
        updates_N = self.updates_N + 1
        first_ND = torch.lerp(self.first_ND, gradient_ND, 1 - beta1)
        second_ND = torch.addcmul(self.second_ND * beta2, gradient_ND, gradient_ND, value=1 - beta2)
        step_N1 = (-learning_rate / (1 - beta1**updates_N)).unsqueeze(1)
        root_N1 = (1 - beta2**updates_N).sqrt().unsqueeze(1)
        decayed_ND = self.table_ND * (missed_N * (1 - learning_rate * decay)).unsqueeze(1)
        table_ND = decayed_ND + step_N1 * first_ND / (second_ND.sqrt() / root_N1 + self.settings.epsilon)
        self.clock += math.log1p(-learning_rate * decay)
        self.table_ND = torch.where(touched_N1, table_ND, self.table_ND)
        self.first_ND = torch.where(touched_N1, first_ND, self.first_ND)
        self.second_ND = torch.where(touched_N1, second_ND, self.second_ND)
        self.updates_N = torch.where(touched_N, updates_N, self.updates_N)
        self.clock_N = torch.where(touched_N, self.clock, self.clock_N)

    def settled_ND(self) -> Tensor:
        """The table with all missed decay."""
        return self.table_ND * torch.exp(self.clock - self.clock_N).unsqueeze(1)
