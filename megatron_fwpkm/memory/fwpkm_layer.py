"""The FwPKM sublayer: projections, z-scored value, gate, memory, output (semantics D).

    q = W_q norm(h)          r = zscore(W_v norm'(h))          g = sigmoid(mean(W_g norm''(h)))
    v = memory(q, r, g)      o = g v + (1 - g) r               layer output = W_o norm'''(o)

Letters: B batch, T tokens, E hidden size, H heads, k = k_dim, D = v_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megatron_fwpkm.accounting import ParameterCount
from megatron_fwpkm.memory.backward import MemoryTrace
from megatron_fwpkm.memory.cache import MemoryCache
from megatron_fwpkm.memory.config import MemoryConfig, Reset
from megatron_fwpkm.memory.documents import remember_documents
from megatron_fwpkm.memory.fast_state import FastState
from megatron_fwpkm.memory.functional import fast_memory
from megatron_fwpkm.memory.norms import RMSNorm
from megatron_fwpkm.memory.statistics import MemoryStatistics

ZSCORE_EPSILON = 1e-6


def zscore(x: Tensor) -> Tensor:
    """(x - mean) / (std + 1e-6) over the last axis, with the unbiased standard deviation; float32 or wider inside.

    Differentiable everywhere: for a constant row the gradient of the standard deviation is taken as 0.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / max(x.shape[-1] - 1, 1)
    positive = variance > 0
    deviation = variance.where(positive, 1).sqrt().where(positive, 0)
    return (centred / (deviation + ZSCORE_EPSILON)).to(x.dtype)


class FwPKMLayer(nn.Module):
    """An extra sublayer with a fast-weight memory: returns what to add to the residual stream.

    Args:
        hidden_size: width E of the residual stream
        config: the memory's settings
        seed: of the fast state's initial values (the same on all replicas)
        linear: makes a projection (in_features, out_features, bias) that returns a tensor
        norm: makes a norm of a given width
        dtype: of the fast state; float64 in tests only

    The fast state is a plain attribute: no parameter, no buffer. `.to(device)` moves it, `.to(dtype)` does not change
    it. With `memory_reads` off a read is 0, so the layer passes its own value only, (1 - g) r. `reset` is the reset
    policy, at first the configuration's; measurements may set another. A `trace` set by the caller is filled by calls
    without a cache (not under `per_document`).
    """

    def __init__(
        self,
        hidden_size: int,
        config: MemoryConfig,
        *,
        seed: int = 0,
        linear: Callable[..., nn.Module] = nn.Linear,
        norm: Callable[[int], nn.Module] = RMSNorm,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config, self.hidden_size = config, hidden_size
        self.query_norm = norm(hidden_size)
        self.query_projection = linear(hidden_size, config.heads * config.k_dim, bias=True)
        self.value_norm = norm(hidden_size)
        self.value_projection = linear(hidden_size, config.v_dim, bias=True)
        self.gate_norm = norm(hidden_size)
        self.gate_projection = linear(hidden_size, config.gate_outputs, bias=True)
        self.output_norm = norm(config.v_dim)
        self.output_projection = linear(config.v_dim, hidden_size, bias=True)
        self.memory_reads = True
        self.reset: Reset = config.reset
        self.trace: MemoryTrace | None = None
        self.fast_state = FastState(config, seed=seed, dtype=dtype)
        self._statistics = MemoryStatistics(config)

    def forward(
        self,
        hidden_BTE: Tensor,
        loss_mask_BT: Tensor | None = None,
        cache: MemoryCache | None = None,
        documents_BT: Tensor | None = None,
    ) -> Tensor:
        """[B, T, E] residual stream to [B, T, E] of what to add to it.

        The loss mask is bool [B, T], true where a token may be written. With a cache the tokens continue its streams;
        without one, training calls write the fast state by its reset policy and others leave it as it was. The
        policy `per_document` needs `documents_BT`, numbers that tell the documents of a sequence apart; others
        take no notice of it.

        Raises:
            ValueError: wrong shapes or dtypes (see `fast_memory`), or no documents where the policy needs them.
        """
        query, value, gate = self._project(hidden_BTE)
        if not self.memory_reads:
            read = torch.zeros_like(value)
        elif cache is not None:
            read = cache(query, value, gate, loss_mask_BT)
        else:
            read = self._remember(query, value, gate, loss_mask_BT, documents_BT)
        if self.config.fuse_output_by_gate:
            share = gate.unsqueeze(-1).to(value.dtype)
            read = share * read + (1 - share) * value
        return self.output_projection(self.output_norm(read.to(hidden_BTE.dtype)))

    def _project(self, hidden_BTE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B, T, H, k], value [B, T, D], gate [B, T]."""
        query = self.query_projection(self.query_norm(hidden_BTE)).unflatten(-1, (self.config.heads, -1))
        value = self.value_projection(self.value_norm(hidden_BTE))
        if self.config.normalize_value:
            value = zscore(value)
        gate = torch.sigmoid(self.gate_projection(self.gate_norm(hidden_BTE)).mean(-1))
        return query, value, gate

    def _remember(
        self, query: Tensor, value: Tensor, gate: Tensor, mask: Tensor | None, documents: Tensor | None = None
    ) -> Tensor:
        self.fast_state.begin_microbatch()
        if self.reset == "per_document":
            if documents is None:
                raise ValueError(
                    "a memory that is reset per_document needs to know the documents: give documents_BT, or set reset "
                    "to carry, per_step or per_sequence"
                )
            return remember_documents(query, value, gate, mask, documents, self.fast_state, self._statistics)
        view = self.fast_state.view(query.shape[0], training=self.training, reset=self.reset)
        return fast_memory(query, value, gate, mask, view, self.config, statistics=self._statistics, trace=self.trace)

    def make_cache(self, batch: int, **options: Any) -> MemoryCache:
        """Streams for inference that start from the fast state as it is now; options as `MemoryCache` has them."""
        return MemoryCache(self.fast_state, batch, **options)

    def statistics(self) -> dict[str, Tensor]:
        """Statistics of the last call (see `MemoryStatistics`); reading them does not synchronize."""
        return self._statistics.tensors()

    def num_parameters(self) -> ParameterCount:
        """Slow: projections and norms; fast: sub-keys and values, of which a token takes all sub-keys and its rows."""
        slow, keys = sum(p.numel() for p in self.parameters()), self.fast_state.keys_H2nd.numel()
        rows = self.config.reads_per_token * self.config.v_dim
        return ParameterCount(slow, keys + self.fast_state.table_ND.numel(), slow + keys + rows)

    def num_flops_per_token(self, sequence_length: int = 0) -> int:
        """Operations of forward and backward per token (a multiply-add is two), at any sequence length."""
        config = self.config
        heads_k, reads = config.heads * config.k_dim, config.reads_per_token
        projections = self.hidden_size * (heads_k + 2 * config.v_dim + config.gate_outputs)
        scoring = 2 * config.n_subkeys * heads_k  # forward only: the backward pass is sparse
        # Passes over (token, slot) pairs: read, write | rho, slot weights twice, row gradients.
        slots = 2 * reads * config.v_dim * (2 + 4)
        # Passes over (token, sub-key) pairs: write | along, query twice, keys.
        subkeys = 2 * config.topk * heads_k * (1 + 4)
        return 6 * projections + scoring + slots + subkeys

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FwPKMLayer:
        """Devices follow the module, dtypes do not."""
        super()._apply(fn, recurse)
        probe = fn(torch.empty(0, device=self.fast_state.device))
        if probe.device.type != "meta":
            self.fast_state.to(probe.device)
        return self
