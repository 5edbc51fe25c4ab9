"""Gated attention, full or over a sliding window, with QK-norm and partial RoPE (semantics E).

Shape legend: B batch, T new tokens, S tokens seen (those of a cache and the new ones), H query heads, G key and value
heads, D head width, W window, M blocks of W tokens, E hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from megatron_fwpkm.accounting import ParameterCount, dense
from megatron_fwpkm.model.cache import AttentionCache
from megatron_fwpkm.model.context import TokenContext
from megatron_fwpkm.model.settings import DecoderConfig
from megatron_fwpkm.parallel.backend import Backend


def attend(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    window: int | None = None,
    *,
    documents_BT: Tensor | None = None,
    mask_BS: Tensor | None = None,
) -> Tensor:
    """Causal softmax attention of the last T of S tokens; returns [B, T, H, D].

    With a window W a token sees itself and the W - 1 before it, at a cost of O(T · W); None sees all.
    Tokens of other documents are not seen (S = T then), nor those whose mask is false; what sees none mixes in 0.
    """
    length, seen = q_BTHD.shape[1], k_BSGD.shape[1]
    if window is not None and seen > length + window - 1:  # nothing that old is seen
        seen = length + window - 1
        k_BSGD, v_BSGD = k_BSGD[:, -seen:], v_BSGD[:, -seen:]
        mask_BS = None if mask_BS is None else mask_BS[:, -seen:]
    if window is None or seen <= window or length == 1:
        return _attend_to_all(q_BTHD, k_BSGD, v_BSGD, documents_BT, mask_BS)
    return _attend_in_blocks(q_BTHD, k_BSGD, v_BSGD, window, documents_BT, mask_BS)


def _attend_to_all(q_BTHD: Tensor, k: Tensor, v: Tensor, documents_BT: Tensor | None, mask_BS: Tensor | None) -> Tensor:
    """Every query sees all tokens up to itself."""
    length, seen = q_BTHD.shape[1], k.shape[1]
    if documents_BT is None and mask_BS is None and length in (1, seen):
        return _mix(q_BTHD, k, v, None, is_causal=length > 1)
    index = torch.arange(seen, device=k.device)
    visible = (index[-length:, None] >= index).view(1, 1, length, seen)
    if documents_BT is not None:
        visible = visible & (documents_BT[:, None, :, None] == documents_BT[:, None, None, :])
    if mask_BS is not None:
        visible = visible & mask_BS[:, None, None, :]
    return _mix(q_BTHD, k, v, visible, may_see_nothing=mask_BS is not None)


def _attend_in_blocks(
    q: Tensor, k: Tensor, v: Tensor, window: int, documents_BT: Tensor | None, mask_BS: Tensor | None
) -> Tensor:
    """Queries in blocks of W tokens see their own block and the one before, masked to the band."""
    batch, length, seen = q.shape[0], q.shape[1], k.shape[1]
    extra = -seen % window
    blocks = (seen + extra) // window
    q_BMWHD = pad(q, (0, 0, 0, 0, seen - length, extra)).unflatten(1, (blocks, window))
    k_BMWGD, v_BMWGD = (pad(x, (0, 0, 0, 0, 0, extra)).unflatten(1, (blocks, window)) for x in (k, v))
    index = torch.arange(2 * window, device=k.device)
    distance = index[window:, None] - index
    visible_MWX = ((distance >= 0) & (distance < window)).expand(blocks, window, 2 * window).clone()
    visible_MWX[0, :, :window] = False  # nothing comes before the first block
    visible = visible_MWX.expand(batch, blocks, window, 2 * window)
    if documents_BT is not None:
        documents = pad(documents_BT, (0, extra)).unflatten(1, (blocks, window))
        visible = visible & (documents.unsqueeze(-1) == _with_previous(documents).unsqueeze(-2))
    if mask_BS is not None:
        visible = visible & _with_previous(pad(mask_BS, (0, extra)).unflatten(1, (blocks, window))).unsqueeze(-2)
    mixed = _mix(
        q_BMWHD.flatten(0, 1),
        _with_previous(k_BMWGD).flatten(0, 1),
        _with_previous(v_BMWGD).flatten(0, 1),
        visible.flatten(0, 1).unsqueeze(1),
        may_see_nothing=mask_BS is not None,
    )
    return mixed.unflatten(0, (batch, blocks)).flatten(1, 2)[:, seen - length : seen]


def _with_previous(x_BMW: Tensor) -> Tensor:
    """[B, M, W, ...] to [B, M, 2 W, ...]: each block behind the one before; zeros before the first."""
    return torch.cat([torch.cat([torch.zeros_like(x_BMW[:, :1]), x_BMW[:, :-1]], 1), x_BMW], 2)


def _mix(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    visible: Tensor | None,
    is_causal: bool = False,
    may_see_nothing: bool = False,
) -> Tensor:
    """torch's fused attention. `visible` is bool [B or 1, 1, T, S]."""
    repeats = q_BTHD.shape[2] // k_BSGD.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BSGD, v_BSGD))
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    nothing = None
    if visible is not None:
        if may_see_nothing:  # a softmax over nothing is NaN on some paths
            nothing = ~visible.any(-1, keepdim=True)
            visible = visible | nothing
        visible = visible.expand(q.shape[0], q.shape[1], -1, -1)
    mixed = scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=is_causal)
    if nothing is not None:
        mixed = mixed.masked_fill(nothing, 0)
    return mixed.transpose(1, 2)


def mean_tokens_seen(length: int, window: int | None) -> float:
    """Tokens that a token sees, itself included, averaged over a text of `length` tokens."""
    reach = length if window is None else min(window, length)
    return reach - reach * (reach - 1) / (2 * length)


class GatedAttention(nn.Module):
    """Attention whose output is gated per head and feature by a sigmoid of the input; heads split over TP ranks.

    With `sliding` a token sees the last `window` tokens; without, all, or as few while `limited` is set.
    """

    def __init__(self, config: DecoderConfig, backend: Backend, *, sliding: bool) -> None:
        super().__init__()
        self._config = config
        self.sliding, self.limited = sliding, False
        hidden, width = config.hidden_size, config.head_dim
        self.query_gate = backend.column_linear(hidden, config.attention_heads * 2 * width)
        self.key = backend.column_linear(hidden, config.key_value_heads * width)
        self.value = backend.column_linear(hidden, config.key_value_heads * width)
        self.output = backend.row_linear(config.attention_heads * width, hidden)
        self.query_norm = backend.share_norm(width)
        self.key_norm = backend.share_norm(width)

    @property
    def window(self) -> int | None:
        """Tokens that a token sees at most; None: all."""
        return self._config.window if self.sliding or self.limited else None

    def make_cache(self) -> AttentionCache:
        """An empty cache of this layer; a sliding one keeps what a window needs."""
        return AttentionCache(self._config.window - 1 if self.sliding else None)

    def forward(self, x_BTE: Tensor, context: TokenContext, cache: AttentionCache | None = None) -> Tensor:
        """Map normed hidden states [B, T, E] to what attention adds to the residual stream.

        With sequence parallelism both are this rank's tokens; the projections bring all tokens together.
        """
        width = self._config.head_dim
        q_BTHD, gate_BTHD = self.query_gate(x_BTE).unflatten(-1, (-1, 2 * width)).chunk(2, dim=-1)
        q_BTHD = context.rotary.rotate(self.query_norm(q_BTHD))
        k_BSGD = context.rotary.rotate(self.key_norm(self.key(x_BTE).unflatten(-1, (-1, width))))
        v_BSGD = self.value(x_BTE).unflatten(-1, (-1, width))
        mask_BS = context.mask_BT
        if cache is not None:
            k_BSGD, v_BSGD, mask_BS = cache.extend(k_BSGD, v_BSGD, mask_BS)
        mixed_BTHD = attend(q_BTHD, k_BSGD, v_BSGD, self.window, documents_BT=context.documents_BT, mask_BS=mask_BS)
        return self.output((mixed_BTHD * torch.sigmoid(gate_BTHD)).flatten(2))

    def num_parameters(self) -> ParameterCount:
        """All slow, all used for every token."""
        return dense(self)

    def num_flops_per_token(self, sequence_length: int) -> int:
        """Operations of forward and backward per token: 6 per weight, 12 per token seen, head and column of a head."""
        config = self._config
        weights = config.hidden_size * config.head_dim * (3 * config.attention_heads + 2 * config.key_value_heads)
        seen = mean_tokens_seen(sequence_length, self.window)
        return 6 * weights + round(12 * config.attention_heads * config.head_dim * seen)
