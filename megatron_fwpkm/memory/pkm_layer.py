"""The PKM layer: product-key addressing with slow values, in place of an MLP (semantics D).

    q = norm_{H k}(W_q x) * w     y = sum over heads and top-k of softmax(score) values[slot]
    layer output = W_o (y * silu(W_s x))

Gradients of the values are sparse: only the rows that were read carry one.
Letters: X tokens, H heads, K top-k, P = H * K, n sub-keys, N = n * n slots, d = k_dim / 2, D value width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fwpkm_kernels import gather_dot, gather_weighted_sum, plan_slots, product_key_topk, scatter_weighted_add
from megatron_fwpkm.accounting import ParameterCount
from megatron_fwpkm.memory import addressing
from megatron_fwpkm.memory.config import MemoryConfig, MemoryConfigError
from megatron_fwpkm.memory.norms import RMSNorm

QUERY_NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class PKMConfig:
    """Settings of a PKM layer, named as in `MemoryConfig`. Raises MemoryConfigError as that does."""

    heads: int = 4
    """Addressing heads H; their reads add up."""
    topk: int = 32
    """Slots K that a token reads per head."""
    n_subkeys: int = 512
    """Sub-keys n per half; N = n * n slots."""
    k_dim: int = 512
    """Query width per head."""
    v_dim: int = 512
    """Width of a slot's value."""
    sparse_gradients: bool = True
    """Gradient of the values as a sparse tensor of the rows read; dense otherwise."""

    def __post_init__(self) -> None:
        if not isinstance(self.sparse_gradients, bool):
            raise MemoryConfigError(f"sparse_gradients is {self.sparse_gradients!r}; it must be of type bool")
        object.__setattr__(
            self,
            "addressing",
            MemoryConfig(
                heads=self.heads,
                topk=self.topk,
                n_subkeys=self.n_subkeys,
                k_dim=self.k_dim,
                v_dim=self.v_dim,
                score_type="dot_product",
            ),
        )

    addressing = None  # the same settings as the addressing functions take them; set in __post_init__


class _ProductKeyValues(torch.autograd.Function):
    """Reads [X, D] of queries [X, H, k], keys [H, 2, n, d], values [N, D]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, keys: Tensor, values: Tensor, config: PKMConfig) -> Tensor:
        halves = addressing.split_queries(query.unsqueeze(0))
        top = product_key_topk(halves, keys.flatten(0, 1), config.topk, "dot_product")
        weight_HXK = top.score.softmax(-1).to(query.dtype)
        weight_XP = addressing.heads_last(weight_HXK, 1)
        plan = plan_slots(addressing.heads_last(top.slot, 1))
        ctx.config, ctx.top, ctx.plan = config, top, plan
        ctx.save_for_backward(halves, keys, values, weight_HXK)
        rows = values.index_select(0, plan.slots_U).to(query.dtype)
        return gather_weighted_sum(rows, plan.inverse_XP, weight_XP)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_XD: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        config: PKMConfig = ctx.config
        settings = config.addressing
        assert settings is not None
        top, plan = ctx.top, ctx.plan
        halves, keys, values, weight = ctx.saved_tensors
        rows = values.index_select(0, plan.slots_U).to(gradient_XD.dtype)
        of_weight = addressing.heads_first(gather_dot(rows, plan.inverse_XP, gradient_XD.contiguous()), 1, config.heads)
        of_score = weight * (of_weight - (weight * of_weight).sum(-1, keepdim=True))
        of_subscore = addressing.spread_to_subkeys(of_score, top)
        subkeys = addressing.plan_subkeys(top, config.n_subkeys)
        flat_keys = keys.flatten(0, 1)
        of_query = addressing.query_gradient(halves, flat_keys, top, subkeys, of_subscore, settings)
        of_keys = addressing.key_gradient(halves, flat_keys, top, subkeys, of_subscore, settings).view_as(keys)
        of_rows = scatter_weighted_add(plan.segments, gradient_XD, addressing.heads_last(weight, 1))
        of_values = torch.sparse_coo_tensor(
            plan.slots_U.unsqueeze(0), of_rows.to(values.dtype), values.shape, is_coalesced=True, check_invariants=False
        )
        if not config.sparse_gradients:
            of_values = of_values.to_dense()
        return addressing.merge_queries(of_query, 1).squeeze(0), of_keys, of_values, None


class PKMLayer(nn.Module):
    """Product-key memory with slow values.

    Args:
        hidden_size: width E of input and output
        config: settings
        linear: makes a projection (in_features, out_features, bias) that returns a tensor

    Initial values as the paper's code (semantics E): keys uniform in +-1 / sqrt(k_dim), values normal with deviation
    1 / sqrt(v_dim), the query projection Xavier-uniform, the others normal with deviation 1 / sqrt(hidden_size).
    """

    def __init__(self, hidden_size: int, config: PKMConfig, *, linear: Callable[..., nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.config, self.hidden_size = config, hidden_size
        width = config.heads * config.k_dim
        self.query_projection = linear(hidden_size, width, bias=True)
        self.query_norm = RMSNorm(width, QUERY_NORM_EPSILON, zero_centred=False)
        self.gate_projection = linear(hidden_size, config.v_dim, bias=True)
        self.output_projection = linear(config.v_dim, hidden_size, bias=True)
        self.keys = nn.Parameter(torch.empty(config.heads, 2, config.n_subkeys, config.k_dim // 2))
        self.values = nn.Parameter(torch.empty(config.n_subkeys**2, config.v_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw initial values from torch's default generator."""
        bound = 1 / math.sqrt(self.config.k_dim)
        nn.init.uniform_(self.keys, -bound, bound)
        nn.init.normal_(self.values, std=1 / math.sqrt(self.config.v_dim))
        for name, parameter in self.named_parameters():
            if name.startswith("query_projection") and name.endswith("weight"):
                nn.init.xavier_uniform_(parameter)
            elif "projection" in name and name.endswith("weight"):
                nn.init.normal_(parameter, std=self.hidden_size**-0.5)
            elif "projection" in name:
                nn.init.zeros_(parameter)

    def forward(self, x_BTE: Tensor) -> Tensor:
        """[B, T, E] to [B, T, E]. Addressing runs in float32 or wider. Raises ValueError for another shape."""
        config = self.config
        if x_BTE.dim() != 3 or x_BTE.shape[-1] != self.hidden_size:
            raise ValueError(f"input has shape {tuple(x_BTE.shape)}; expected [batch, tokens, {self.hidden_size}]")
        if x_BTE.numel() == 0:
            return x_BTE.clone()
        query = self.query_norm(self.query_projection(x_BTE)).flatten(0, 1).unflatten(-1, (config.heads, -1))
        dtype = torch.promote_types(query.dtype, torch.float32)
        with torch.autocast(x_BTE.device.type, enabled=False):
            read_XD = _ProductKeyValues.apply(query.to(dtype), self.keys.to(dtype), self.values, config)
        read = read_XD.view(*x_BTE.shape[:2], -1).to(x_BTE.dtype)
        return self.output_projection(read * nn.functional.silu(self.gate_projection(x_BTE)))

    def num_parameters(self) -> ParameterCount:
        """All slow; of the values a token takes the rows that it reads."""
        slow = sum(p.numel() for p in self.parameters())
        idle = self.values.numel() - self.config.heads * self.config.topk * self.config.v_dim
        return ParameterCount(slow, 0, slow - idle)

    def num_flops_per_token(self, sequence_length: int = 0) -> int:
        """Operations of forward and backward per token (a multiply-add is two), at any sequence length."""
        config = self.config
        width, reads = config.heads * config.k_dim, config.heads * config.topk
        projections = self.hidden_size * (width + 2 * config.v_dim)
        scoring = 2 * config.n_subkeys * width
        return 6 * projections + scoring + 2 * reads * config.v_dim * 3 + 2 * config.topk * width * 2
