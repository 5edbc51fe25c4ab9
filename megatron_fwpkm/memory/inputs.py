"""Checks on what a memory is called with: one clear error before anything is written."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fwpkm.memory.chunk import ChunkSpan
from megatron_fwpkm.memory.config import MemoryConfig
from megatron_fwpkm.memory.fast_state import MemoryView
from megatron_fwpkm.memory.routing import LOCAL, MemoryGroup


@dataclass(frozen=True)
class Expected:
    """What a rank has of a call that a group of ranks makes together."""

    queries: int
    tokens: int
    targets: int
    width: int
    group: MemoryGroup = LOCAL

    @classmethod
    def of(cls, spans: list[ChunkSpan], config: MemoryConfig, group: MemoryGroup) -> Expected:
        """By the chunks' spans."""
        return cls(
            sum(span.queries.stop - span.queries.start for span in spans),
            sum(span.own_length for span in spans),
            sum(span.own_pairs for span in spans),
            config.v_dim // group.columns,
            group,
        )


def check_inputs(
    query: Tensor,
    target: Tensor,
    gate: Tensor | None,
    mask: Tensor | None,
    view: MemoryView,
    config: MemoryConfig,
    expected: Expected | None = None,
) -> None:
    """Raise ValueError for shapes, dtypes or (with `check_finite`) values that the memory can't use.

    `expected` is what this rank must have; None: the same tokens of everything. Over a group values that are not finite
    on any rank are an error on all.
    """
    if query.dim() != 4 or query.shape[2:] != (config.heads, config.k_dim):
        raise ValueError(
            f"query has shape {tuple(query.shape)}; expected [batch, tokens, heads = {config.heads}, "
            f"k_dim = {config.k_dim}]"
        )
    batch, tokens = query.shape[:2]
    if expected is None:
        expected = Expected(tokens, tokens, tokens, config.v_dim)
    if tokens != expected.queries:
        raise ValueError(f"query has {tokens} tokens; this rank's share of the chunks has {expected.queries}")
    tokens = expected.tokens
    wanted = {
        "target": (target, (batch, expected.targets, expected.width)),
        "gate": (gate, (batch, tokens)),
        "mask": (mask, (batch, tokens)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape} to go with the query")
    if mask is not None:
        check_mask_type(mask)
    for name, tensor in (("query", query), ("target", target), ("gate", gate)):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}; expected a floating-point dtype")
        if tensor.device != view.keys_MH2nd.device:
            raise ValueError(f"{name} is on {tensor.device} but the memory is on {view.keys_MH2nd.device}")
    if config.check_finite:
        _check_finite({"query": query, "target": target, "gate": gate}, expected.group)
    if view.memories not in (1, batch):
        raise ValueError(f"the memory view has {view.memories} memories; a batch of {batch} needs 1 or {batch}")
    if view.tables != expected.group.tables:
        raise ValueError(
            f"the memory view has rows for {view.tables} replicas' memories, the group for {expected.group.tables}: "
            "memories that start anew with each sequence are apart, others are one for all batches"
        )
    if expected.group.batches > 1 and view.memories > 1:
        raise ValueError(
            f"{view.memories} memories, one for each sequence, can't be written by {expected.group.batches} replicas' "
            "batches together: make the memory group with apart=True"
        )


def check_loss_mask(mask_BT: Tensor | None, shape: tuple[int, int]) -> None:
    """Raise ValueError unless a layer's mask is bool and of all its tokens, before it is divided among ranks."""
    if mask_BT is None:
        return
    if tuple(mask_BT.shape) != shape:
        raise ValueError(
            f"the loss mask has shape {tuple(mask_BT.shape)}; expected {shape}, that of all tokens on every rank"
        )
    check_mask_type(mask_BT)


def check_mask_type(mask: Tensor) -> None:
    """Raise ValueError unless a mask is bool."""
    if mask.dtype != torch.bool:
        raise ValueError(
            f"mask has dtype {mask.dtype}; expected torch.bool, true where a token may be written "
            "(an additive attention mask is no loss mask)"
        )


def _check_finite(tensors: dict[str, Tensor | None], group: MemoryGroup) -> None:
    bad = None
    for name, tensor in tensors.items():
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            where = (~torch.isfinite(tensor)).nonzero()[0].tolist()
            bad = bad or f"{name} holds NaN or infinity, first at {where}; the memory was not touched"
    query = tensors["query"]
    assert query is not None
    if group.anywhere(query.new_tensor(float(bad is not None))):
        raise ValueError(bad or "an input of another rank holds NaN or infinity; the memory was not touched")
