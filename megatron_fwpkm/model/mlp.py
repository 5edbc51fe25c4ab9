"""SwiGLU MLP."""

from __future__ import annotations

import torch
from torch import nn

from megatron_fwpkm.accounting import ParameterCount, dense
from megatron_fwpkm.parallel.backend import Backend


class SwigluMlp(nn.Module):
    """down(silu(gate x) · up x) without biases; the inner features are split over TP ranks."""

    def __init__(self, hidden_size: int, inner_size: int, backend: Backend) -> None:
        super().__init__()
        self._weights = 3 * hidden_size * inner_size
        self.gate = backend.column_linear(hidden_size, inner_size)
        self.up = backend.column_linear(hidden_size, inner_size)
        self.down = backend.row_linear(inner_size, hidden_size)

    def forward(self, x_BTE: torch.Tensor) -> torch.Tensor:
        """Map normed hidden states [B, T, hidden] to what the MLP adds to the residual stream."""
        return self.down(nn.functional.silu(self.gate(x_BTE)) * self.up(x_BTE))

    def num_parameters(self) -> ParameterCount:
        """All slow, all used for every token."""
        return dense(self)

    def num_flops_per_token(self, sequence_length: int) -> int:
        """Floating-point operations of forward and backward per token: 6 per weight."""
        return 6 * self._weights
