"""The PKM layer: product-key addressing with slow values, in place of an MLP (semantics D).

    q = norm_{H k}(W_q x) * w     y = sum over heads and top-k of softmax(score) values[slot]
    layer output = W_o (y * silu(W_s x))

Gradients of the values are sparse: only the rows that were read carry one.
Letters: X tokens of this rank, H heads, K top-k, P = H * K, n sub-keys, N slots of this rank (n * n in all),
d = k_dim / 2, D value width; U and Q as in routing.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fwpkm_kernels import SlotPlan, gather_dot, gather_weighted_sum, product_key_topk, scatter_weighted_add
from megatron_fwpkm.accounting import ParameterCount
from megatron_fwpkm.memory import addressing
from megatron_fwpkm.memory.config import MemoryConfig, MemoryConfigError
from megatron_fwpkm.memory.exchange import RankGroup
from megatron_fwpkm.memory.groups import make_memory_group
from megatron_fwpkm.memory.norms import RMSNorm
from megatron_fwpkm.memory.placement import ALONE, Placement
from megatron_fwpkm.memory.routing import ChunkShape, MemoryGroup
from megatron_fwpkm.memory.slow_table import SlowTable
from megatron_fwpkm.memory.tokens import TokenParts, summed_over
from megatron_fwpkm.memory.traffic import Traffic
from megatron_fwpkm.phase import PHASE

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
        _ = self.addressing  # checks the numbers

    @cached_property
    def addressing(self) -> MemoryConfig:
        """The same settings as the addressing functions take them."""
        return MemoryConfig(
            heads=self.heads,
            topk=self.topk,
            n_subkeys=self.n_subkeys,
            k_dim=self.k_dim,
            v_dim=self.v_dim,
            score_type="dot_product",
        )


class _ProductKeyValues(torch.autograd.Function):
    """Reads [X, D] of queries [X, H, k], keys [H, 2, n, d], and the values [N, D] of this rank of a group.

    Gradients are those of this rank's tokens, and of its values those of the tokens of all ranks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        config: PKMConfig,
        group: MemoryGroup,
        tokens: int,
    ) -> Tensor:
        halves = addressing.split_queries(query.unsqueeze(0))
        top = product_key_topk(halves, keys.flatten(0, 1), config.topk, "dot_product")
        weight_HXK = top.score.softmax(-1).to(query.dtype)
        shape = ChunkShape(1, tokens, 1)
        route = group.route(addressing.heads_last(top.slot, 1), addressing.heads_last(weight_HXK, 1), shape)
        ctx.config, ctx.top, ctx.route = config, top, route
        ctx.group, ctx.place = group, PHASE.place
        ctx.save_for_backward(halves, keys, values, weight_HXK)
        plan = route.plan
        rows_UD = values.index_select(0, plan.slots_U).to(query.dtype)
        return route.to_tokens(gather_weighted_sum(rows_UD, plan.inverse_XP, route.weight, plan.offsets_X))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_XD: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        with ctx.group.backward_pass(), PHASE.at(ctx.place):
            return _ProductKeyValues._gradients(ctx, gradient_XD)

    @staticmethod
    def _gradients(ctx: Any, gradient_XD: Tensor) -> tuple[Tensor | None, ...]:
        config: PKMConfig = ctx.config
        settings = config.addressing
        top, route = ctx.top, ctx.route
        halves, keys, values, weight = ctx.saved_tensors
        plan: SlotPlan = route.plan
        gradient_QD, _ = route.to_rows(gradient_XD.contiguous())
        rows_UD = values.index_select(0, plan.slots_U).to(gradient_XD.dtype)
        of_weight = route.reads_to_tokens(gather_dot(rows_UD, plan.inverse_XP, gradient_QD, plan.offsets_X))
        of_weight = addressing.heads_first(of_weight, 1, config.heads)
        of_score = weight * (of_weight - (weight * of_weight).sum(-1, keepdim=True))
        of_subscore = addressing.spread_to_subkeys(of_score, top)
        subkeys = addressing.plan_subkeys(top, config.n_subkeys)
        flat_keys = keys.flatten(0, 1)
        of_query = addressing.query_gradient(halves, flat_keys, top, subkeys, of_subscore, settings)
        of_keys = addressing.key_gradient(halves, flat_keys, top, subkeys, of_subscore, settings).view_as(keys)
        of_rows = scatter_weighted_add(plan.segments, gradient_QD, route.weight)
        of_values = torch.sparse_coo_tensor(
            plan.slots_U.unsqueeze(0), of_rows.to(values.dtype), values.shape, is_coalesced=True, check_invariants=False
        )
        if not config.sparse_gradients:
            of_values = of_values.to_dense()
        return addressing.merge_queries(of_query, 1).squeeze(0), of_keys, of_values, None, None, None


class _QueryNorm(RMSNorm):
    """RMSNorm of this rank's part of the tokens."""

    def __init__(self, width: int, group: dist.ProcessGroup | None) -> None:
        super().__init__(width, QUERY_NORM_EPSILON, zero_centred=False)
        self._group = group

    def scale(self) -> Tensor:
        return summed_over(_wide(super().scale()), self._group)


def _wide(x: Tensor) -> Tensor:
    """In float32, or as it is if wider: sums over ranks in narrower numbers would lose bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class PKMLayer(nn.Module):
    """Product-key memory with slow values.

    Args:
        hidden_size: width E of input and output
        config: settings
        linear: makes a projection (in_features, out_features, bias) that returns a tensor; where the tokens are
            divided over ranks, one whose gradients are summed over them
        placement: the ranks that tokens and slots are divided over: those of tensor parallelism

    Values are spread over the ranks as a fast memory's are (`sharding.Owners`), and each rank works on its own part of
    the tokens: reads go to the owners of their slots, gradients of values arise there. `values` is no parameter but
    `table.values_ND` (see SlowTable): `.to` moves and converts it, `state_dict` does not have it, and
    `load_state_dict` takes a whole table of that name where there is one.

    Initial values as the paper's code (semantics E): keys uniform in +-1 / sqrt(k_dim), values normal with deviation
    1 / sqrt(v_dim), the query projection Xavier-uniform, the others normal with deviation 1 / sqrt(hidden_size).
    On all ranks those of one rank that has the whole.

    Raises MemoryConfigError when there are more ranks than sub-keys.
    """

    def __init__(
        self,
        hidden_size: int,
        config: PKMConfig,
        *,
        linear: Callable[..., nn.Module] = nn.Linear,
        placement: Placement = ALONE,
    ) -> None:
        super().__init__()
        self.config, self.hidden_size = config, hidden_size
        self.table = SlowTable(config.addressing, placement.tensor_rank, placement.tensor_ranks)
        self._token_group = placement.tensor_group
        self._memory_group = _memory_group(config.addressing, placement)
        self.sequence_parallel = placement.sequence_parallel  # may be switched off for calls on whole sequences
        self._parts: TokenParts | None = None  # of the last call
        width = config.heads * config.k_dim
        self.query_projection = linear(hidden_size, width, bias=True)
        self.query_norm = _QueryNorm(width, self._token_group)
        self.gate_projection = linear(hidden_size, config.v_dim, bias=True)
        self.output_projection = linear(config.v_dim, hidden_size, bias=True)
        self.keys = nn.Parameter(torch.empty(config.heads, 2, config.n_subkeys, config.k_dim // 2))
        self.reset_parameters()

    @property
    def values(self) -> Tensor:
        """[N, D]: the values of this rank's slots, a leaf tensor with sparse gradients."""
        return self.table.values_ND

    def match_values(self) -> None:
        """Bring the values to dtype and device of the parameters, after these were converted without the module."""
        self.table.apply(lambda values: values.to(self.keys))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw initial values from torch's default generator."""
        bound = 1 / math.sqrt(self.config.k_dim)
        nn.init.uniform_(self.keys, -bound, bound)
        self.table.draw()
        for name, parameter in self.named_parameters():
            if name.startswith("query_projection") and name.endswith("weight"):
                nn.init.xavier_uniform_(parameter)
            elif "projection" in name and name.endswith("weight"):
                nn.init.normal_(parameter, std=self.hidden_size**-0.5)
            elif "projection" in name:
                nn.init.zeros_(parameter)

    def forward(self, x_BTE: Tensor) -> Tensor:
        """[B, T, E] to [B, T, E]. Addressing runs in float32 or wider. Raises ValueError for another shape.

        Under sequence parallelism T are this rank's tokens, otherwise all of them, and all ranks call this together.
        """
        if x_BTE.dim() != 3 or x_BTE.shape[-1] != self.hidden_size:
            raise ValueError(f"input has shape {tuple(x_BTE.shape)}; expected [batch, tokens, {self.hidden_size}]")
        if x_BTE.numel() == 0:
            return x_BTE.clone()
        parts = self._divide(x_BTE)
        if parts is None:
            return self._read(x_BTE, x_BTE.shape[0] * x_BTE.shape[1] * self.table.ranks)
        own_XE = parts.take(x_BTE.flatten(0, 1))
        return parts.gather(self._read(own_XE, parts.tokens)).view_as(x_BTE)

    def _divide(self, x_BTE: Tensor) -> TokenParts | None:
        """Even contiguous parts of tokens that all ranks have; None where each has its own already."""
        if self._token_group is None or self.sequence_parallel:
            return None
        tokens, ranks = x_BTE.shape[0] * x_BTE.shape[1], self.table.ranks
        if self._parts is None or self._parts.tokens != tokens or self._parts.own.device != x_BTE.device:
            shares = [torch.arange(tokens * rank // ranks, tokens * (rank + 1) // ranks) for rank in range(ranks)]
            self._parts = TokenParts(shares, self._token_group, x_BTE.device)
        return self._parts

    def _read(self, x_XE: Tensor, tokens: int) -> Tensor:
        """[X, E] or [B, T, E] to the same shape, of this rank's part of the `tokens` of all."""
        query = (
            self.query_norm(self.query_projection(x_XE))
            .flatten(0, -2)
            .unflatten(-1, (self.config.heads, self.config.k_dim))
        )
        keys = summed_over(_wide(self.keys), self._token_group)
        dtype = torch.promote_types(query.dtype, keys.dtype)
        with torch.autocast(x_XE.device.type, enabled=False):
            read_XD = _ProductKeyValues.apply(
                query.to(dtype), keys.to(dtype), self.values, self.config, self._memory_group, tokens
            )
        read = read_XD.view(*x_XE.shape[:-1], self.config.v_dim).to(x_XE.dtype)
        return self.output_projection(read * nn.functional.silu(self.gate_projection(x_XE)))

    def traffic(self) -> Traffic | None:
        """What this rank sent for the values since the last call; None where they are on one rank."""
        group = self._memory_group
        return group.traffic.take() if isinstance(group, RankGroup) else None

    def num_parameters(self) -> ParameterCount:
        """All slow, the values of this rank's slots among them; of those a token takes the rows that it reads."""
        dense = sum(p.numel() for p in self.parameters())
        reads = self.config.heads * self.config.topk
        v_dim, ranks = self.config.v_dim, self.table.ranks
        return ParameterCount(dense + self.table.num_slots * v_dim, 0, dense + reads * v_dim // ranks)

    def num_flops_per_token(self, sequence_length: int = 0) -> int:
        """Operations of forward and backward per token (a multiply-add is two), at any sequence length."""
        config = self.config
        width, reads = config.heads * config.k_dim, config.heads * config.topk
        projections = self.hidden_size * (width + 2 * config.v_dim)
        scoring = 2 * config.n_subkeys * width
        return 6 * projections + scoring + 2 * reads * config.v_dim * 3 + 2 * config.topk * width * 2

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PKMLayer:
        """The values follow the module, in device and dtype."""
        super()._apply(fn, recurse)
        self.table.apply(fn)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Whole values are taken if they are there."""
        whole = state_dict.pop(prefix + "values", None)
        if whole is not None:
            try:
                self.table.place(whole)
            except ValueError as error:
                arguments[-1].append(f"{prefix}values: {error}")  # torch's list of messages
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def _memory_group(config: MemoryConfig, placement: Placement) -> MemoryGroup:
    """The ranks that the values are spread over, as routes go: those of one replica, whole rows on each."""
    return make_memory_group(replace(placement, memory_group=placement.tensor_group, sharding="slots"), config)


def slow_tables(model: nn.Module) -> dict[str, SlowTable]:
    """The tables of all PKM layers of a model, by the names that their values would have as parameters."""
    return {
        f"{name}.values" if name else "values": module.table
        for name, module in model.named_modules()
        if isinstance(module, PKMLayer)
    }


def named_slow_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All that training changes, by name: the parameters, then the values of PKM layers."""
    yield from model.named_parameters()
    for name, table in slow_tables(model).items():
        yield name, table.values_ND
