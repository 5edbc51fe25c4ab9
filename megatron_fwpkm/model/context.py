"""What the layers of a decoder know about the tokens of a call beside their hidden states.

Shape legend: B batch, T sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_fwpkm.model.rotary import RotaryTables, rotary_tables
from megatron_fwpkm.model.settings import DecoderConfig


@dataclass(frozen=True)
class TokenContext:
    """Positions, documents and padding of one call, prepared once for all layers."""

    rotary: RotaryTables
    documents_BT: torch.Tensor | None = None
    """Numbers that tell the documents of a sequence apart; nothing looks across. None: each sequence is one text."""
    places_BT: torch.Tensor | None = None
    """Tokens since the start of the document; None without documents."""
    mask_BT: torch.Tensor | None = None
    """True for real tokens, false for padding; None: all are real."""


def make_context(
    config: DecoderConfig,
    tokens_BT: torch.Tensor,
    dtype: torch.dtype,
    *,
    documents_BT: torch.Tensor | None = None,
    positions_BT: torch.Tensor | None = None,
    mask_BT: torch.Tensor | None = None,
    past_B: torch.Tensor | None = None,
) -> TokenContext:
    """Check what comes with the tokens and prepare it.

    RoPE's positions are those given; else places in the documents; else the real tokens counted so far, `past_B` [B]
    of which a cache has seen before. Raises ValueError for wrong shapes or dtypes.
    """
    for name, tensor in (("documents_BT", documents_BT), ("positions_BT", positions_BT), ("mask_BT", mask_BT)):
        if tensor is not None and tensor.shape != tokens_BT.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the tokens have {tuple(tokens_BT.shape)}")
    if mask_BT is not None and mask_BT.dtype != torch.bool:
        raise ValueError(f"mask_BT has dtype {mask_BT.dtype}; it must be torch.bool, true for real tokens")
    if documents_BT is not None and past_B is not None:
        raise ValueError("a cache holds one text for each sequence; it takes no documents_BT")
    places_BT = None if documents_BT is None else places_in_documents(documents_BT)
    positions = positions_BT
    if positions is None:
        positions = places_BT
    if positions is None:
        positions = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        if mask_BT is not None:
            positions = (mask_BT.cumsum(1) - 1).clamp_min(0)
        if past_B is not None:
            positions = positions + past_B.unsqueeze(1)
    return TokenContext(rotary_tables(config, positions, dtype), documents_BT, places_BT, mask_BT)


def document_starts(documents_BT: torch.Tensor) -> torch.Tensor:
    """bool [B, T]: whether a token is the first of its document."""
    starts_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    torch.ne(documents_BT[:, 1:], documents_BT[:, :-1], out=starts_BT[:, 1:])
    return starts_BT


def places_in_documents(documents_BT: torch.Tensor) -> torch.Tensor:
    """int64 [B, T]: tokens between the start of the document and each token."""
    index_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    first_BT = torch.where(document_starts(documents_BT), index_T, 0).cummax(1).values
    return index_T - first_BT
