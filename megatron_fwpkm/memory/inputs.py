"""Checks on what a memory is called with: one clear error before anything is written."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_fwpkm.memory.config import MemoryConfig
from megatron_fwpkm.memory.fast_state import MemoryView


def check_inputs(
    query: Tensor,
    target: Tensor,
    gate: Tensor | None,
    mask: Tensor | None,
    view: MemoryView,
    config: MemoryConfig,
    targets: int | None = None,
) -> None:
    """Raise ValueError for shapes, dtypes or (with `check_finite`) values that the memory can't use.

    `targets` are the tokens that `target` must have; None means as many as the query.
    """
    if query.dim() != 4 or query.shape[2:] != (config.heads, config.k_dim):
        raise ValueError(
            f"query has shape {tuple(query.shape)}; expected [batch, tokens, heads = {config.heads}, "
            f"k_dim = {config.k_dim}]"
        )
    batch, tokens = query.shape[:2]
    wanted = {
        "target": (target, (batch, tokens if targets is None else targets, config.v_dim)),
        "gate": (gate, (batch, tokens)),
        "mask": (mask, (batch, tokens)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape} to go with the query")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(
            f"mask has dtype {mask.dtype}; expected torch.bool, true where a token may be written "
            "(an additive attention mask is no loss mask)"
        )
    for name, tensor in (("query", query), ("target", target), ("gate", gate)):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}; expected a floating-point dtype")
        if tensor.device != view.keys_MH2nd.device:
            raise ValueError(f"{name} is on {tensor.device} but the memory is on {view.keys_MH2nd.device}")
        if config.check_finite and not bool(torch.isfinite(tensor).all()):
            where = (~torch.isfinite(tensor)).nonzero()[0].tolist()
            raise ValueError(f"{name} holds NaN or infinity, first at {where}; the memory was not touched")
    if view.memories not in (1, batch):
        raise ValueError(f"the memory view has {view.memories} memories; a batch of {batch} needs 1 or {batch}")
