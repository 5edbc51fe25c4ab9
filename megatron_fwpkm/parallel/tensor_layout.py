"""How parameters are split over tensor-parallel ranks, as the layers that made them declare it.

Every layer that splits a parameter says so on the parameter itself, with Megatron's attributes: Megatron's and
Transformer Engine's layers do, and `Backend.split_parameter`. All other parameters are whole on every rank. Saving,
loading and converting ask here and nowhere else.
"""

from __future__ import annotations

import torch


def split_dimension(parameter: torch.Tensor) -> int | None:
    """The dimension of which each tensor-parallel rank has an equal, contiguous share; None for a whole parameter.

    Raises ValueError for shares that are not contiguous.
    """
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    if getattr(parameter, "partition_stride", 1) != 1:
        raise ValueError(f"a parameter of shape {tuple(parameter.shape)} is split with a stride: not supported")
    return int(parameter.partition_dim)  # type: ignore[attr-defined]
