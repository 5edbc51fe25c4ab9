"""Norms of the memory sublayers."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (offset + weight), over the last axis, in float32 or wider (semantics D).

    Args:
        size: width of the last axis
        epsilon: added to the mean square
        zero_centred: weight starts at 0 and 1 is added to it; otherwise it starts at 1
    """

    def __init__(self, size: int, epsilon: float = 1e-5, *, zero_centred: bool = True) -> None:
        super().__init__()
        self.epsilon, self.offset = epsilon, 1.0 if zero_centred else 0.0
        self.weight = nn.Parameter(torch.full((size,), 1.0 - self.offset))

    def scale(self) -> Tensor:
        """The weight as the forward pass uses it."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        """Any shape [..., size]; returns the same shape and dtype."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return (wide * inverse * (self.offset + self.scale().to(wide.dtype))).to(x.dtype)
