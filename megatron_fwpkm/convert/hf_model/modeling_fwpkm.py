# mypy: ignore-errors
"""Decoders with fast-weight product key memory (FwPKM, arXiv 2601.00671): a sparse memory written while it is read.

Needs torch and transformers alone. Letters: B batch, T tokens, E hidden size, H heads, K top-k, n sub-keys, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_fwpkm import FwPKMConfig

IDW_EPSILON = 1e-3
ENTROPY_EPSILON = 1e-8
ZSCORE_EPSILON = 1e-6
UNIT_EPSILON = 1e-6


def wide(x: Tensor) -> Tensor:
    """In float32, or as it is if wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """x / rms(x) times 1 + weight, or times weight."""

    def __init__(self, size: int, epsilon: float, zero_centred: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size) if zero_centred else torch.ones(size))
        self.epsilon, self.zero_centred = epsilon, zero_centred

    def forward(self, x: Tensor) -> Tensor:
        y = wide(x)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.epsilon)
        weight = self.weight.to(y.dtype)
        return (y * (1 + weight if self.zero_centred else weight)).to(x.dtype)


# -- the fast-weight memory -------------------------------------------------------------------------------------------


def best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest scores and their places; of equal ones the first."""
    values, places = scores.sort(dim=-1, descending=True, stable=True)
    return values[..., :count], places[..., :count]


class Rows:
    """Values of a memory over a stored table that stays as it is: copies of the rows that were written.

    True values are `scale` times the stored ones where nothing was written, so that decay of all rows costs nothing.
    """

    def __init__(self, table_ND: Tensor) -> None:
        self.table_ND = table_ND
        self.scale = 1.0
        self.slots_U = table_ND.new_empty(0, dtype=torch.int64)
        self.rows_UD = table_ND.new_empty(0, table_ND.shape[1])  # true values over scale

    def read(self, slots_U: Tensor) -> Tensor:
        """True values of slots, which may repeat."""
        rows = wide(self.table_ND[slots_U])
        if self.slots_U.numel():
            place = torch.searchsorted(self.slots_U, slots_U).clamp_max(self.slots_U.numel() - 1)
            here = self.slots_U[place] == slots_U
            rows = torch.where(here.unsqueeze(-1), self.rows_UD[place].to(rows.dtype), rows)
        return rows * self.scale

    def write(self, slots_U: Tensor, rows_UD: Tensor, decay: float) -> None:
        """Set distinct slots, in ascending order, to true values, and decay all others."""
        self.scale *= decay
        kept = ~torch.isin(self.slots_U, slots_U)
        slots = torch.cat([self.slots_U[kept], slots_U])
        rows = torch.cat([self.rows_UD[kept].to(rows_UD.dtype), rows_UD / self.scale])
        self.slots_U, order = slots.sort()
        self.rows_UD = rows[order]

    def copy(self) -> Rows:
        """Another one that goes its own way."""
        other = Rows(self.table_ND)
        other.scale, other.slots_U, other.rows_UD = self.scale, self.slots_U, self.rows_UD
        return other


@dataclass
class Address:
    """Where tokens read: sub-key indices and scores of both halves [X, H, 2, K], slots and weights [X, H, K]."""

    query_XH2d: Tensor
    index_XH2K: Tensor
    score_XH2K: Tensor
    rank_XH2K: Tensor
    """Of each slot, which of the K best sub-keys it takes."""
    slots_XHK: Tensor
    raw_XHK: Tensor
    weights_XHK: Tensor


@dataclass
class Waiting:
    """Tokens of S sequences that wait for their write, [S, c, ...]."""

    query: Tensor
    target: Tensor
    gate: Tensor
    mask: Tensor | None

    def __getitem__(self, piece: slice) -> Waiting:
        mask = None if self.mask is None else self.mask[:, piece]
        return Waiting(self.query[:, piece], self.target[:, piece], self.gate[:, piece], mask)

    def __len__(self) -> int:
        return self.query.shape[1]

    def join(self, other: Waiting) -> Waiting:
        mask = None
        if self.mask is not None or other.mask is not None:
            masks = [
                w.query.new_ones(w.query.shape[:2], dtype=torch.bool) if w.mask is None else w.mask
                for w in (self, other)
            ]
            mask = torch.cat(masks, 1)
        pairs = ((self.query, other.query), (self.target, other.target), (self.gate, other.gate))
        return Waiting(*(torch.cat(pair, 1) for pair in pairs), mask)


class Memory:
    """One memory and the sequences that share it: reads tokens and writes whatever chunks they complete.

    Args:
        config: its settings
        keys: stored sub-keys [H, 2, n, k / 2]
        rows: its values
        sequences: number S of sequences
        official: whether chunks are written as the paper's code does with a cache
    """

    def __init__(self, config: FwPKMConfig, keys: Tensor, rows: Rows, sequences: int, official: bool) -> None:
        self.config, self.keys, self.rows, self.sequences = config, keys, rows, sequences
        self.official = official
        self.waiting: Waiting | None = None
        size = config.fwpkm_update_chunk_size
        self.chunk = None if isinstance(size, str) else int(size)
        self.lookahead = config.fwpkm_target_value_lookahead
        self.decay = 1 - config.fwpkm_optimizer_lr * config.fwpkm_optimizer_weight_decay

    def copy(self) -> Memory:
        """Another one that goes its own way."""
        other = Memory(self.config, self.keys, self.rows.copy(), self.sequences, self.official)
        other.waiting = self.waiting
        return other

    # -- reading

    def address(self, query_XHk: Tensor) -> Address:
        """Slots and weights of queries [X, H, k]."""
        config, count = self.config, self.config.fwpkm_topk
        halves = query_XHk.unflatten(-1, (2, -1))
        found = []
        for half in range(2):
            query_HXd, keys_Hnd = halves[:, :, half].transpose(0, 1), self.keys[:, half]
            if config.fwpkm_qk_score_type == "dot_product":
                scores_HXn = query_HXd @ keys_Hnd.transpose(1, 2)
            else:  # without the expansion of the square, which loses digits
                mode = "donot_use_mm_for_euclid_dist"
                distance = torch.cdist(query_HXd.contiguous(), keys_Hnd.contiguous(), compute_mode=mode)
                scores_HXn = -torch.log(distance.square() + IDW_EPSILON)
            found.append(best(scores_HXn.transpose(0, 1), count))
        (score_1, index_1), (score_2, index_2) = found
        raw, place = best((score_1.unsqueeze(-1) + score_2.unsqueeze(-2)).flatten(-2), count)
        rank_1, rank_2 = torch.div(place, count, rounding_mode="floor"), place % count
        slots = index_1.gather(-1, rank_1) * config.fwpkm_n_subkeys + index_2.gather(-1, rank_2)
        return Address(
            halves,
            torch.stack([index_1, index_2], 2),
            torch.stack([score_1, score_2], 2),
            torch.stack([rank_1, rank_2], 2),
            slots,
            raw,
            self._weights(raw),
        )

    def _weights(self, raw_XHK: Tensor) -> Tensor:
        """Softmax over all heads' slots of a token together, or silu or relu of each."""
        scaled = (raw_XHK / self.config.fwpkm_score_temperature).flatten(1)
        kind = self.config.fwpkm_score_nonlinear
        weights = scaled.softmax(-1) if kind == "softmax" else getattr(functional, kind)(scaled)
        return weights.view_as(raw_XHK)

    def read(self, address: Address) -> Tensor:
        """[X, D]."""
        slots_XP, weights_XP = address.slots_XHK.flatten(1), address.weights_XHK.flatten(1)
        rows = self.rows.read(slots_XP.flatten()).view(*slots_XP.shape, -1)
        return (rows * weights_XP.unsqueeze(-1)).sum(1)

    # -- calls

    def __call__(self, tokens: Waiting, frozen: bool) -> Tensor:
        """Reads [S, T, D] of new tokens, which are written unless the memory is frozen."""
        official = self.official
        reads, start, length = [], 0, len(tokens)
        while start < length:
            held = 0 if self.waiting is None else len(self.waiting)
            if self.chunk is None:
                size = length
            elif official:
                size = self.chunk + self.lookahead - held if start == 0 else self.chunk
            else:
                size = self.chunk - held
            piece = tokens[start : start + size]
            address = self.address(piece.query.flatten(0, 1))
            reads.append(self.read(address).view(self.sequences, len(piece), -1))
            start += len(piece)
            if frozen:
                continue
            self.waiting = piece if self.waiting is None else self.waiting.join(piece)
            if official and (self.chunk is None or len(self.waiting) >= self.chunk):
                self._write_official(address, len(piece))
            elif not official and len(self.waiting) == self.chunk:
                self.finish()
        return torch.cat(reads, 1)

    def finish(self) -> None:
        """Write the tokens that wait for their chunk to fill, as the end of a training sequence does."""
        if self.waiting is None or self.official:
            return
        tokens, self.waiting = self.waiting, None
        length = len(tokens)
        pairs = max(length - self.lookahead, 0)
        address = self.address(tokens.query.flatten(0, 1))
        read = self.read(address).view(self.sequences, length, -1)
        error = read[:, :pairs] - tokens.target[:, self.lookahead :][:, :pairs]
        samples = self.sequences * length if tokens.mask is None else int(tokens.mask[:, :pairs].sum())
        self._write(address, tokens[:pairs], error, samples, address.slots_XHK.flatten())

    def _write_official(self, current: Address, slice_length: int) -> None:
        """As the paper's code with a cache: the last `lookahead` tokens stay, counts are of the current slice alone."""
        assert self.waiting is not None
        queue, pairs = self.waiting, len(self.waiting) - self.lookahead
        if pairs <= 0:
            return
        head = queue[:pairs]
        address = self.address(head.query.flatten(0, 1))
        error = self.read(address).view(self.sequences, pairs, -1) - queue.target[:, self.lookahead :]
        samples = self.sequences * slice_length if head.mask is None else int(head.mask.sum())
        self._write(address, head, error, samples, current.slots_XHK.flatten())
        self.waiting = queue[pairs:] if self.lookahead else None

    def _write(self, address: Address, tokens: Waiting, error: Tensor, samples: int, counted: Tensor) -> None:
        """One gradient step of the memory loss on values, one of the addressing loss on sub-keys.

        `tokens` are those with a target, `error` [S, pairs, D]; `address` is of all tokens of the chunk (in official
        mode of those with a target), `counted` the slots whose reads divide the step.
        """
        config, pairs = self.config, len(tokens)
        weight = error.new_ones(self.sequences, pairs)
        if config.fwpkm_weight_loss_with_gates:
            weight = weight * tokens.gate
        if tokens.mask is not None:
            weight = weight * tokens.mask
        new_keys = self.keys * self.decay
        has_loss = config.fwpkm_addr_loss is not None and config.fwpkm_addr_loss_weight
        if has_loss or not config.fwpkm_mem_grad_to_values_only:
            gradient = self._key_gradient(address, weight, error)
            if config.fwpkm_grad_clip:
                gradient = gradient.clamp(-1, 1)
            new_keys = new_keys - config.fwpkm_optimizer_lr * gradient
        if pairs:
            length = address.slots_XHK.shape[0] // self.sequences
            own = address.slots_XHK.view(self.sequences, length, -1)[:, :pairs].flatten(0, 1)
            share = address.weights_XHK.view(self.sequences, length, -1)[:, :pairs].flatten(0, 1)
            slots_U, inverse = torch.unique(own.flatten(), return_inverse=True)
            terms = (share * weight.flatten().unsqueeze(1)).unsqueeze(-1) * error.flatten(0, 1).unsqueeze(1)
            total = torch.zeros(len(slots_U), error.shape[-1], dtype=error.dtype, device=error.device)
            total.index_add_(0, inverse, terms.flatten(0, 1))
            seen, times = torch.unique(counted, return_counts=True)
            place = torch.searchsorted(seen, slots_U).clamp_max(len(seen) - 1)
            counts = torch.where(seen[place] == slots_U, times[place], 1)
            scale = samples * config.fwpkm_heads * config.fwpkm_topk / (self.sequences * pairs)
            gradient = total * (scale / counts).to(total.dtype).unsqueeze(1)
            if config.fwpkm_grad_clip:
                gradient = gradient.clamp(-1, 1)
            rows = self.rows.read(slots_U)
            self.rows.write(slots_U, self.decay * rows - config.fwpkm_optimizer_lr * gradient, self.decay)
        else:
            self.rows.scale *= self.decay
        self.keys = new_keys

    def _key_gradient(self, address: Address, weight: Tensor, error: Tensor) -> Tensor:
        """Gradient [H, 2, n, k / 2] of the addressing loss, and of the memory loss where it moves sub-keys too."""
        config = self.config
        slope_XH2K = torch.zeros_like(address.score_XH2K)
        if config.fwpkm_addr_loss is not None and config.fwpkm_addr_loss_weight:
            slope_XH2K = slope_XH2K + config.fwpkm_addr_loss_weight * self._addressing_slope(address)
        if not config.fwpkm_mem_grad_to_values_only:
            slope_XH2K = slope_XH2K + self._memory_slope(address, weight, error)
        gradient = torch.zeros_like(self.keys)
        for head in range(config.fwpkm_heads):
            for half in range(2):
                index_XK, slope_XK = address.index_XH2K[:, head, half], slope_XH2K[:, head, half]
                query_XKd = address.query_XH2d[:, head, half].unsqueeze(1).expand(-1, index_XK.shape[1], -1)
                if config.fwpkm_qk_score_type == "dot_product":
                    change = query_XKd
                else:
                    difference = self.keys[head, half][index_XK] - query_XKd
                    change = -2 * difference / (difference.square().sum(-1, keepdim=True) + IDW_EPSILON)
                terms = slope_XK.unsqueeze(-1) * change
                gradient[head, half].index_add_(0, index_XK.flatten(), terms.flatten(0, 1))
        return gradient

    def _addressing_slope(self, address: Address) -> Tensor:
        """Of the negative entropy of the sub-keys' mean use, to each score [X, H, 2, K]."""
        slopes = []
        for half in range(2):
            index, share = address.index_XH2K[:, :, half], address.score_XH2K[:, :, half].softmax(-1)
            count = share[..., 0].numel()
            mean = share.new_zeros(self.config.fwpkm_n_subkeys).index_add_(0, index.flatten(), share.flatten()) / count
            outer = (torch.log(mean + ENTROPY_EPSILON) + mean / (mean + ENTROPY_EPSILON))[index] / count
            slopes.append(share * (outer - (share * outer).sum(-1, keepdim=True)))
        return torch.stack(slopes, 2)

    def _memory_slope(self, address: Address, weight: Tensor, error: Tensor) -> Tensor:
        """Of half the mean memory loss, to each score [X, H, 2, K]."""
        pairs = error.shape[1]
        slope = torch.zeros_like(address.score_XH2K)
        if pairs == 0:
            return slope
        length = address.slots_XHK.shape[0] // self.sequences
        slots = address.slots_XHK.view(self.sequences, length, -1)[:, :pairs]
        rows = self.rows.read(slots.flatten()).view(*slots.shape, -1)
        of_weight = (rows * error.unsqueeze(2)).sum(-1) * (weight / error.numel()).unsqueeze(-1)
        of_weight = functional.pad(of_weight, (0, 0, 0, length - pairs)).flatten(0, 1).view_as(address.raw_XHK)
        scaled, kind = address.raw_XHK / self.config.fwpkm_score_temperature, self.config.fwpkm_score_nonlinear
        if kind == "softmax":
            mean = (address.weights_XHK * of_weight).flatten(1).sum(-1)[:, None, None]
            of_score = address.weights_XHK * (of_weight - mean)
        elif kind == "silu":
            sigmoid = scaled.sigmoid()
            of_score = of_weight * sigmoid * (1 + scaled * (1 - sigmoid))
        else:
            of_score = of_weight * (scaled > 0)
        of_score = of_score / self.config.fwpkm_score_temperature
        for half in range(2):
            slope[:, :, half].scatter_add_(-1, address.rank_XH2K[:, :, half], of_score)
        return slope


# -- caches -----------------------------------------------------------------------------------------------------------


@dataclass
class LayerState:
    """What one layer keeps of its streams."""

    keys: Tensor | None = None  # attention, [B, S, G, d]
    values: Tensor | None = None
    inputs: Tensor | None = None  # convolution: the last inputs [B, L - 1, C]
    state: Tensor | None = None  # delta rule [B, H, K, V]
    memories: list[Memory] | None = None  # one for each sequence, or one for all


class FwPKMCache:
    """Attention, delta-rule and memory state of a batch of streams."""

    is_compileable = False

    def __init__(self, config: FwPKMConfig, batch: int) -> None:
        self.config, self.batch = config, batch
        self.layers = [LayerState() for _ in range(config.num_hidden_layers)]
        self.seen = 0
        self.real_B: Tensor | None = None
        """Tokens of each sequence, padding not counted."""
        self.mask_BS: Tensor | None = None
        """Which of the tokens seen are real; None: all."""

    def __len__(self) -> int:
        return len(self.layers)

    def get_seq_length(self, layer_idx: int = 0, cache_position: Tensor | None = None) -> int:
        """Tokens seen, padding included."""
        return self.seen

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """There is no limit."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let stream i go on as stream beam_idx[i] would (beam search). Raises ValueError for a shared memory."""
        for layer in self.layers:
            if layer.memories is not None and len(layer.memories) != self.batch:
                raise ValueError(
                    "streams that share one memory can't be reordered: use memory_mode='per_sequence' for beam search"
                )
            for name in ("keys", "values", "inputs", "state"):
                tensor = getattr(layer, name)
                if tensor is not None:
                    setattr(layer, name, tensor.index_select(0, beam_idx.to(tensor.device)))
            if layer.memories is not None:
                layer.memories = [layer.memories[int(index)].copy() for index in beam_idx]
        if self.real_B is not None:
            self.real_B = self.real_B[beam_idx]
        if self.mask_BS is not None:
            self.mask_BS = self.mask_BS[beam_idx]
        self.batch = len(beam_idx)

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each stream `repeats` times."""
        self.reorder_cache(torch.arange(self.batch).repeat_interleave(repeats))

    def crop(self, max_length: int) -> None:
        """Forget the tokens after max_length. Raises ValueError unless there are none: writes can't be taken back."""
        if max_length < 0:
            max_length = self.seen + max_length
        if max_length < self.seen:
            raise ValueError(
                f"a cache of {self.seen} tokens can't be cropped to {max_length}: memories and linear attention have "
                "no way back; compute the prefix again"
            )

    def finish(self) -> None:
        """Write the tokens that wait for their chunk to fill."""
        for layer in self.layers:
            for memory in layer.memories or ():
                memory.finish()


# -- layers -----------------------------------------------------------------------------------------------------------


@dataclass
class Context:
    """What all layers of a call know of its tokens."""

    cosine: Tensor
    sine: Tensor
    mask_BT: Tensor | None
    frozen: bool

    def rotate(self, x_BTHd: Tensor) -> Tensor:
        """Turn the first features of each head by the tokens' positions."""
        width = self.cosine.shape[-1]
        turned, kept = x_BTHd[..., :width], x_BTHd[..., width:]
        first, second = turned.chunk(2, -1)
        return torch.cat([turned * self.cosine + torch.cat([-second, first], -1) * self.sine, kept], -1)


def rotary_tables(config: FwPKMConfig, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine [B, T, 1, R]; frequencies are computed in float32, with YaRN where rope_scaling says so."""
    width, base = int(config.head_dim * config.partial_rotary_factor), config.rope_theta
    period = base ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    frequency, factor, scaling = 1.0 / period, 1.0, config.rope_scaling
    if scaling:
        original = scaling.get("original_max_position_embeddings", config.max_position_embeddings)

        def pair_that_turns(times: float) -> float:
            return width * math.log(original / (times * 2 * math.pi)) / (2 * math.log(base))

        low = max(math.floor(pair_that_turns(scaling.get("beta_fast", 32.0))), 0)
        high = min(math.ceil(pair_that_turns(scaling.get("beta_slow", 1.0))), width - 1)
        span = high - low if high != low else 0.001
        ramp = ((torch.arange(width // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
        frequency = ramp / (scaling["factor"] * period) + frequency * (1 - ramp)
        factor = scaling.get("attention_factor")
        factor = 0.1 * math.log(scaling["factor"]) + 1.0 if factor is None else factor
    kind = torch.promote_types(dtype, torch.float32)
    angles = positions_BT.to(kind).unsqueeze(-1) * frequency.to(positions_BT.device, kind)
    angles = torch.cat([angles, angles], -1).unsqueeze(-2)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


class FwPKMAttention(nn.Module):
    """Gated attention, over all tokens or a sliding window."""

    def __init__(self, config: FwPKMConfig, sliding: bool) -> None:
        super().__init__()
        self.config, self.window = config, config.sliding_window if sliding else None
        width = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * 2 * width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * width, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * width, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(width, config.rms_norm_eps)
        self.k_norm = RMSNorm(width, config.rms_norm_eps)

    def forward(self, x_BTE: Tensor, context: Context, layer: LayerState | None, mask_BS: Tensor | None) -> Tensor:
        """Of normed hidden states, what is added to the residual stream."""
        width = self.config.head_dim
        q, gate = self.q_proj(x_BTE).unflatten(-1, (-1, 2 * width)).chunk(2, -1)
        q = context.rotate(self.q_norm(q))
        k = context.rotate(self.k_norm(self.k_proj(x_BTE).unflatten(-1, (-1, width))))
        v = self.v_proj(x_BTE).unflatten(-1, (-1, width))
        if layer is not None:
            if layer.keys is not None and layer.values is not None:
                k, v = torch.cat([layer.keys, k], 1), torch.cat([layer.values, v], 1)
            layer.keys, layer.values = k, v
        visible = self._visible(q.shape[1], k.shape[1], mask_BS, q.device)
        repeats = q.shape[2] // k.shape[2]
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        nothing = ~visible.any(-1, keepdim=True)  # padding: a softmax over nothing is not a number
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=visible | nothing)
        mixed = mixed.masked_fill(nothing, 0).transpose(1, 2)
        return self.o_proj((mixed * torch.sigmoid(gate)).flatten(2))

    def _visible(self, length: int, seen: int, mask_BS: Tensor | None, device: torch.device) -> Tensor:
        """[B or 1, 1, T, S]."""
        place = torch.arange(seen, device=device)
        distance = place[-length:, None] - place
        visible = (distance >= 0)[None, None]
        if self.window is not None:
            visible = visible & (distance < self.window)
        return visible if mask_BS is None else visible & mask_BS[:, None, None, :]


def unit(x: Tensor) -> Tensor:
    """x over its length."""
    return (wide(x) * torch.rsqrt(wide(x).square().sum(-1, keepdim=True) + UNIT_EPSILON)).to(x.dtype)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gated delta rule token after token, in float32 or wider: outputs [B, T, H, V] and the state after them."""
    kind, dtype = torch.promote_types(v.dtype, torch.float32), v.dtype
    q, k, v, decay, beta = (x.to(kind) for x in (q, k, v, decay, beta))
    if state is None:
        state = k.new_zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[3])
    outputs = []
    for t in range(k.shape[1]):
        state = state * decay[:, t, :, None, None].exp()
        missing = v[:, t] - (k[:, t].unsqueeze(-2) @ state).squeeze(-2)
        state = state + k[:, t].unsqueeze(-1) @ (beta[:, t].unsqueeze(-1) * missing).unsqueeze(-2)
        outputs.append((q[:, t].unsqueeze(-2) @ state).squeeze(-2))
    return (torch.stack(outputs, 1) * k.shape[-1] ** -0.5).to(dtype), state


class FwPKMGatedDeltaNet(nn.Module):
    """Linear attention whose state is decayed and corrected token by token."""

    def __init__(self, config: FwPKMConfig) -> None:
        super().__init__()
        self.config = config
        keys, values = config.linear_num_key_heads, config.linear_num_value_heads
        self.key_width, self.value_width = keys * config.linear_key_head_dim, values * config.linear_value_head_dim
        channels, kernel = 2 * self.key_width + self.value_width, config.linear_conv_kernel_dim
        self.in_proj_qkvz = nn.Linear(config.hidden_size, channels + self.value_width, bias=False)
        self.in_proj_ba = nn.Linear(config.hidden_size, 2 * values, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, kernel, groups=channels, bias=False)
        self.dt_bias = nn.Parameter(torch.ones(values))
        self.A_log = nn.Parameter(torch.empty(values).uniform_(1e-6, 16).log())
        self.norm = RMSNorm(config.linear_value_head_dim, config.rms_norm_eps, zero_centred=False)
        self.out_proj = nn.Linear(self.value_width, config.hidden_size, bias=False)

    def forward(self, x_BTE: Tensor, context: Context, layer: LayerState | None) -> Tensor:
        """Of normed hidden states, what is added to the residual stream."""
        config = self.config
        qkvz, ba = self.in_proj_qkvz(x_BTE), self.in_proj_ba(x_BTE)
        if context.mask_BT is not None:
            qkvz, ba = (x * context.mask_BT.unsqueeze(-1) for x in (qkvz, ba))
        heads, ratio = config.linear_num_key_heads, config.linear_num_value_heads // config.linear_num_key_heads
        key, value = config.linear_key_head_dim, ratio * config.linear_value_head_dim
        q, k, v, z = qkvz.unflatten(-1, (heads, -1)).split((key, key, value, value), -1)
        mixed = self._convolve(torch.cat([part.flatten(2) for part in (q, k, v)], -1), layer)
        q, k, v = functional.silu(mixed).split((self.key_width, self.key_width, self.value_width), -1)
        q, k = (unit(x.unflatten(-1, (heads, -1))).repeat_interleave(ratio, 2) for x in (q, k))
        beta, step = (part.flatten(2) for part in ba.unflatten(-1, (heads, 2 * ratio)).chunk(2, -1))
        step = functional.softplus(wide(step) + wide(self.dt_bias))
        output, state = delta_rule(
            q,
            k,
            v.unflatten(-1, (heads * ratio, -1)),
            -wide(self.A_log).exp() * step,
            beta.sigmoid(),
            None if layer is None else layer.state,
        )
        if layer is not None:
            layer.state = state
        gate = functional.silu(z.unflatten(-1, (ratio, -1)).flatten(2, 3))
        return self.out_proj((self.norm(output) * gate).flatten(2))

    def _convolve(self, x_BTC: Tensor, layer: LayerState | None) -> Tensor:
        lags = self.config.linear_conv_kernel_dim - 1
        past = None if layer is None else layer.inputs
        if past is None:
            past = x_BTC.new_zeros(x_BTC.shape[0], lags, x_BTC.shape[2])
        joined = torch.cat([past, x_BTC], 1)
        if layer is not None:
            layer.inputs = joined[:, joined.shape[1] - lags :]
        return self.conv1d(joined.transpose(1, 2)).transpose(1, 2)


class FwPKMMLP(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, config: FwPKMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTE: Tensor) -> Tensor:
        """Of normed hidden states, what is added to the residual stream."""
        return self.down_proj(functional.silu(self.gate_proj(x_BTE)) * self.up_proj(x_BTE))


class _PKMQuery(nn.Module):
    def __init__(self, config: FwPKMConfig) -> None:
        super().__init__()
        width = config.pkm_heads * config.pkm_k_dim
        self.query_mlps = nn.ModuleList([nn.Linear(config.hidden_size, width)])
        self.norm = RMSNorm(width, 1e-6, zero_centred=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.query_mlps[0](x))


class FwPKMSlowMemory(nn.Module):
    """Product-key memory with trained values, in place of an MLP."""

    def __init__(self, config: FwPKMConfig) -> None:
        super().__init__()
        self.config = config
        self.query_proj = _PKMQuery(config)
        self.keys = nn.Parameter(torch.empty(config.pkm_heads * 2 * config.pkm_n_subkeys, config.pkm_k_dim // 2))
        self.values = nn.Embedding(config.pkm_n_subkeys**2, config.pkm_v_dim)
        self.swilu_projection = nn.Linear(config.hidden_size, config.pkm_v_dim)
        self.value_proj = nn.Linear(config.pkm_v_dim, config.hidden_size)

    def forward(self, x_BTE: Tensor) -> Tensor:
        """Of normed hidden states, what is added to the residual stream."""
        config, count = self.config, self.config.pkm_topk
        query = wide(self.query_proj(x_BTE)).unflatten(-1, (config.pkm_heads, 2, -1))
        keys = wide(self.keys).view(config.pkm_heads, 2, config.pkm_n_subkeys, -1)
        scores = torch.einsum("bthpd,hpnd->bthpn", query, keys)
        (score_1, index_1), (score_2, index_2) = (best(scores[..., half, :], count) for half in range(2))
        score, place = best((score_1.unsqueeze(-1) + score_2.unsqueeze(-2)).flatten(-2), count)
        rank_1, rank_2 = torch.div(place, count, rounding_mode="floor"), place % count
        slots = index_1.gather(-1, rank_1) * config.pkm_n_subkeys + index_2.gather(-1, rank_2)
        rows = wide(self.values(slots.flatten(2)))
        read = (rows * score.softmax(-1).flatten(2).unsqueeze(-1)).sum(2).to(x_BTE.dtype)
        return self.value_proj(read * functional.silu(self.swilu_projection(x_BTE)))


class FwPKMState(nn.Module):
    """The stored memory of a layer: sub-keys and values as files hold them. Calls write copies."""

    def __init__(self, config: FwPKMConfig) -> None:
        super().__init__()
        self.config = config
        heads, sub_keys = config.fwpkm_heads, config.fwpkm_n_subkeys
        self.keys = nn.Parameter(torch.empty(heads * 2 * sub_keys, config.fwpkm_k_dim // 2), requires_grad=False)
        self.values = nn.Parameter(torch.empty(sub_keys**2, config.fwpkm_v_dim), requires_grad=False)

    def memory(self, sequences: int, official: bool) -> Memory:
        """A memory that begins as the stored one."""
        config = self.config
        keys = wide(self.keys.detach()).view(config.fwpkm_heads, 2, config.fwpkm_n_subkeys, -1)
        return Memory(config, keys, Rows(self.values.detach()), sequences, official)

    @torch.no_grad()
    def store(self, memory: Memory) -> None:
        """Keep what a memory has written."""
        rows = memory.rows
        if rows.scale != 1.0:
            self.values.mul_(rows.scale)
        self.values[rows.slots_U] = (rows.rows_UD * rows.scale).to(self.values.dtype)
        self.keys.copy_(memory.keys.flatten(0, 2))


class FwPKMDecoderLayer(nn.Module):
    """h += memory(h), where there is one; h += mixer(norm h); h += mlp(norm h)."""

    def __init__(self, config: FwPKMConfig, index: int) -> None:
        super().__init__()
        self.config = config
        hidden, epsilon = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(hidden, epsilon)
        self.post_attention_layernorm = RMSNorm(hidden, epsilon)
        self.has_memory = index in config.fwpkm_layers
        kind = config.layer_types[index]
        if kind == "linear_attention":
            self.linear_attn = FwPKMGatedDeltaNet(config)
        else:
            self.self_attn = FwPKMAttention(config, sliding=kind == "sliding_attention")
        if index in config.pkm_layers:
            self.pkm = FwPKMSlowMemory(config)
        else:
            self.mlp = FwPKMMLP(config)
        if self.has_memory:
            self.fw_q_norm, self.fw_v_norm = RMSNorm(hidden, epsilon), RMSNorm(hidden, epsilon)
            self.fw_out_gate_norm = RMSNorm(hidden, epsilon)
            self.fw_out_norm = RMSNorm(config.fwpkm_v_dim, epsilon)
            self.fw_q_proj = nn.Linear(hidden, config.fwpkm_heads * config.fwpkm_k_dim)
            self.fw_v_proj = nn.Linear(hidden, config.fwpkm_v_dim)
            self.fw_out_gate = nn.Linear(hidden, config.fwpkm_gate_outputs)
            self.fw_out_proj = nn.Linear(config.fwpkm_v_dim, hidden)
            self.fwpkm = FwPKMState(config)

    def forward(
        self,
        h_BTE: Tensor,
        context: Context,
        layer: LayerState | None,
        mask_BS: Tensor | None,
        memories: list[Memory] | None,
    ) -> Tensor:
        """Residual stream in, residual stream out."""
        if memories is not None:
            h_BTE = h_BTE + self._remember(h_BTE, context, memories)
        x = self.input_layernorm(h_BTE)
        if hasattr(self, "linear_attn"):
            h_BTE = h_BTE + self.linear_attn(x, context, layer)
        else:
            h_BTE = h_BTE + self.self_attn(x, context, layer, mask_BS)
        x = self.post_attention_layernorm(h_BTE)
        return h_BTE + (self.pkm(x) if hasattr(self, "pkm") else self.mlp(x))

    def _remember(self, h_BTE: Tensor, context: Context, memories: list[Memory]) -> Tensor:
        config = self.config
        query = self.fw_q_proj(self.fw_q_norm(h_BTE)).unflatten(-1, (config.fwpkm_heads, -1))
        value = self.fw_v_proj(self.fw_v_norm(h_BTE))
        if config.fwpkm_compress_value:
            value = zscore(value)
        gate = torch.sigmoid(self.fw_out_gate(self.fw_out_gate_norm(h_BTE)).mean(-1))
        tokens = Waiting(wide(query), wide(value), wide(gate), None)
        if len(memories) == 1 and h_BTE.shape[0] == memories[0].sequences:
            if memories[0].sequences > 1:  # one memory for all: padding counts as positions and is not written
                tokens.mask = context.mask_BT
            read = (
                self._of_one(tokens, memories[0], context, 0)
                if tokens.mask is None
                else memories[0](tokens, context.frozen)
            )
        else:
            read = torch.cat([self._of_one(row(tokens, b), one, context, b) for b, one in enumerate(memories)])
        read = read.to(value.dtype)
        if config.fwpkm_out_fuse_gate:
            share = gate.unsqueeze(-1).to(value.dtype)
            read = share * read + (1 - share) * value
        return self.fw_out_proj(self.fw_out_norm(read))

    def _of_one(self, tokens: Waiting, memory: Memory, context: Context, b: int) -> Tensor:
        """Reads [S, T, D] of sequences with a memory of their own: padding is no token of theirs."""
        if context.mask_BT is None:
            return memory(tokens, context.frozen)
        real = context.mask_BT[b].nonzero().view(-1)
        read = tokens.target.new_zeros(tokens.target.shape)
        if real.numel():
            own = Waiting(tokens.query[:, real], tokens.target[:, real], tokens.gate[:, real], None)
            read = read.index_copy(1, real, memory(own, context.frozen))
        return read


def row(tokens: Waiting, b: int) -> Waiting:
    """One sequence."""
    piece = slice(b, b + 1)
    return Waiting(tokens.query[piece], tokens.target[piece], tokens.gate[piece], None)


def zscore(x: Tensor) -> Tensor:
    """(x - mean) / (deviation + 1e-6) over the last axis."""
    y = wide(x)
    centred = y - y.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / max(x.shape[-1] - 1, 1)
    positive = variance > 0
    deviation = variance.where(positive, 1).sqrt().where(positive, 0)
    return (centred / (deviation + ZSCORE_EPSILON)).to(x.dtype)


# -- models -----------------------------------------------------------------------------------------------------------


class FwPKMPreTrainedModel(PreTrainedModel):
    """Base of the models."""

    config_class = FwPKMConfig
    base_model_prefix = "model"
    _no_split_modules: ClassVar = ["FwPKMDecoderLayer"]
    _skip_keys_device_placement: ClassVar = ["past_key_values"]
    _keep_in_fp32_modules_strict: ClassVar = ["fwpkm"]
    _supports_sdpa = True
    _is_stateful = True  # generate() leaves caches to the model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Embedding):
            module.weight.normal_(0, std)
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()
        elif isinstance(module, RMSNorm):
            module.weight.fill_(0.0 if module.zero_centred else 1.0)
        elif isinstance(module, FwPKMState):
            bound = 1 / math.sqrt(self.config.fwpkm_k_dim)
            module.keys.uniform_(-bound, bound)
            module.values.normal_(0, 1 / math.sqrt(self.config.fwpkm_v_dim))
        elif isinstance(module, FwPKMSlowMemory):
            bound = 1 / math.sqrt(self.config.pkm_k_dim)
            module.keys.uniform_(-bound, bound)
        elif isinstance(module, FwPKMGatedDeltaNet):
            module.dt_bias.fill_(1.0)
            module.A_log.uniform_(1e-6, 16).log_()


class FwPKMModel(FwPKMPreTrainedModel):
    """Embedding, blocks and norm."""

    def __init__(self, config: FwPKMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(FwPKMDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def memories(self, batch: int, *, official: bool = False) -> list[list[Memory] | None]:
        """Of each layer new memories: one for each sequence, or one for all."""
        count, sequences = (batch, 1) if self.config.memory_mode == "per_sequence" else (1, batch)
        return [
            [layer.fwpkm.memory(sequences, official) for _ in range(count)] if layer.has_memory else None
            for layer in self.layers
        ]

    def store(self, memories: list[list[Memory] | None]) -> None:
        """Keep what memories have written. Raises ValueError where there are several of a layer."""
        for layer, own in zip(self.layers, memories, strict=True):
            if own is None:
                continue
            if len(own) > 1:
                raise ValueError(
                    f"carry_memory keeps one memory, and {len(own)} sequences have written one each: give one "
                    "sequence, or load with memory_mode='shared'"
                )
            layer.fwpkm.store(own[0])

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: FwPKMCache | None = None,
        inputs_embeds: Tensor | None = None,
        freeze_memory: bool | None = None,
        carry_memory: bool | None = None,
    ) -> Tensor:
        """Hidden states [B, T, E] of tokens that continue a cache's streams, or stand alone.

        `attention_mask` [B, S] is of the tokens seen and the new ones; padding stands left. Raises ValueError for what
        does not fit together.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them")
        h_BTE = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length = h_BTE.shape[:2]
        cache, config = past_key_values, self.config
        frozen = config.freeze_memory if freeze_memory is None else freeze_memory
        carried = config.carry_memory if carry_memory is None else carry_memory
        if cache is not None and cache.batch != batch:
            raise ValueError(f"the cache is of {cache.batch} streams, this call has {batch}")
        seen = 0 if cache is None else cache.seen
        mask_BS = self._mask(attention_mask, batch, seen, length)
        mask_BT = None if mask_BS is None else mask_BS[:, seen:]
        if mask_BT is not None and bool(mask_BT.all()):
            mask_BT = None
        positions = self._positions(position_ids, mask_BT, cache, h_BTE)
        cosine, sine = rotary_tables(config, positions, h_BTE.dtype)
        context = Context(cosine, sine, mask_BT, frozen)
        memories = self.memories(batch) if cache is None else self._memories_of(cache)
        for index, layer in enumerate(self.layers):
            state = None if cache is None else cache.layers[index]
            h_BTE = layer(h_BTE, context, state, mask_BS, memories[index])
        if cache is not None:
            real = torch.full((batch,), length, device=h_BTE.device) if mask_BT is None else mask_BT.sum(1)
            cache.real_B = real if cache.real_B is None else cache.real_B + real
            cache.seen += length
            cache.mask_BS = mask_BS
        elif carried and not frozen:
            for own in memories:
                for memory in own or ():
                    memory.finish()
            self.store(memories)
        return self.norm(h_BTE)

    def _memories_of(self, cache: FwPKMCache) -> list[list[Memory] | None]:
        official = self.config.cache_mode == "official"
        if cache.seen == 0 and all(layer.memories is None for layer in cache.layers):
            for layer, own in zip(cache.layers, self.memories(cache.batch, official=official), strict=True):
                layer.memories = own
        return [layer.memories for layer in cache.layers]

    def _mask(self, mask: Tensor | None, batch: int, seen: int, length: int) -> Tensor | None:
        """Bool [B, S], or None where all tokens are real."""
        if mask is None:
            return None
        if mask.dim() != 2 or mask.shape != (batch, seen + length):
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}; expected {(batch, seen + length)}: 1 for each real "
                "token seen or given, 0 for padding"
            )
        mask = mask.bool()
        return None if bool(mask.all()) else mask

    def _positions(
        self, given: Tensor | None, mask_BT: Tensor | None, cache: FwPKMCache | None, h_BTE: Tensor
    ) -> Tensor:
        """Of each token in its sequence, padding not counted."""
        if given is not None:
            return given
        batch, length = h_BTE.shape[:2]
        ones = torch.ones(batch, length, dtype=torch.int64, device=h_BTE.device)
        places = (ones if mask_BT is None else mask_BT.long()).cumsum(1) - 1
        if cache is not None and cache.real_B is not None:
            places = places + cache.real_B.unsqueeze(1)
        return places.clamp_min(0)


class FwPKMForCausalLM(FwPKMPreTrainedModel, GenerationMixin):
    """Language model: `generate()` writes its memory as it reads and as it generates.

    `freeze_memory` (read only) and `carry_memory` (what was written becomes the stored memory) are taken by calls and
    by generate(); None takes the configuration's.
    """

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: FwPKMConfig) -> None:
        super().__init__(config)
        self.model = FwPKMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the head."""
        self.lm_head = value

    def make_cache(self, batch: int) -> FwPKMCache:
        """Empty streams, whose memories begin as the stored ones at their first call."""
        return FwPKMCache(self.config, batch)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: FwPKMCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        freeze_memory: bool | None = None,
        carry_memory: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss where labels are given (-100 is not counted).

        Without a cache the memory is written within the call and dropped. With one (use_cache, or past_key_values of a
        call before) it goes on in the next call; there are no gradients then.
        """
        batch = (input_ids if inputs_embeds is None else inputs_embeds).shape[0]
        if past_key_values is None and use_cache:
            past_key_values = self.make_cache(batch)
        with torch.set_grad_enabled(torch.is_grad_enabled() and past_key_values is None):
            hidden = self.model(
                input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, freeze_memory, carry_memory
            )
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: FwPKMCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The tokens that the cache has not seen."""
        inputs: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": use_cache}
        inputs |= {name: kwargs[name] for name in ("logits_to_keep", "freeze_memory") if kwargs.get(name) is not None}
        if use_cache and past_key_values is None:
            past_key_values = self.make_cache(input_ids.shape[0] if inputs_embeds is None else inputs_embeds.shape[0])
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        if inputs_embeds is not None and seen == 0:
            inputs["inputs_embeds"] = inputs_embeds
        else:
            inputs["input_ids"] = input_ids[:, seen:] if inputs_embeds is None else input_ids[:, -1:]
        return {**inputs, "past_key_values": past_key_values}
