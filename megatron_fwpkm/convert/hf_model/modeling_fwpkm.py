"""Decoders with fast-weight product key memory (FwPKM, arXiv 2601.00671): a sparse memory written while it is read.

Needs torch and transformers (4.57 or 5) alone. From top to bottom: the memory, caches, layers, models.

Letters in tensor names: B batch, T tokens of a call, X tokens seen, E hidden size; of a memory: S sequences that share
it, C tokens of a chunk, Y = S C, H heads, K slots that a token reads per head, P = H K, n sub-keys, d width of half a
query, N slots, D width of a value, U distinct slots. A 2 stands for the two halves of a query.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_fwpkm import FwPKMConfig, Rope

IDW_EPSILON = 1e-3
ENTROPY_EPSILON = 1e-8
ZSCORE_EPSILON = 1e-6
UNIT_EPSILON = 1e-6
DELTA_CHUNK = 64
"""Tokens that the delta rule takes at once."""
DELTA_LOOP = 8
"""Up to so many tokens, one after the other is faster."""


def wide(x: Tensor) -> Tensor:
    """In float32, or as it is if wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """x / rms(x) times 1 + weight, or times weight; computed in float32 or wider."""

    def __init__(self, size: int, epsilon: float, zero_centred: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size) if zero_centred else torch.ones(size))
        self.epsilon, self.zero_centred = epsilon, zero_centred

    def forward(self, x: Tensor) -> Tensor:
        """The same shape and dtype."""
        y = wide(x)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.epsilon)
        weight = self.weight.to(y.dtype)
        return (y * (1 + weight if self.zero_centred else weight)).to(x.dtype)


# -- the fast-weight memory -------------------------------------------------------------------------------------------


def best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest scores and their places; of equal ones the first."""
    values, places = scores.sort(dim=-1, descending=True, stable=True)
    return values[..., :count], places[..., :count]


def best_pairs(score_1: Tensor, score_2: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of scores [..., K] of both halves the largest sums, and which entries of either half they are made of."""
    score, place = best((score_1.unsqueeze(-1) + score_2.unsqueeze(-2)).flatten(-2), count)
    width = score_2.shape[-1]
    return score, torch.div(place, width, rounding_mode="floor"), place % width


class Values:
    """Values of a memory: a stored table that stays as it is, and the rows that were written since.

    `scale` is the decay of all rows that were not written, so that decay costs nothing.
    """

    def __init__(self, table_ND: Tensor) -> None:
        self.table_ND = table_ND
        self.scale = 1.0
        self.slots_U = torch.empty(0, dtype=torch.int64, device=table_ND.device)  # ascending
        self.rows_UD = wide(table_ND.new_empty(0, table_ND.shape[1]))

    def read(self, slots: Tensor) -> Tensor:
        """[..., D] of slots of any shape."""
        rows = wide(self.table_ND[slots]) * self.scale
        if self.slots_U.numel() == 0:
            return rows
        place = torch.searchsorted(self.slots_U, slots).clamp_max(self.slots_U.numel() - 1)
        written = self.slots_U[place] == slots
        return torch.where(written.unsqueeze(-1), self.rows_UD[place], rows)

    def decay(self, factor: float) -> None:
        """Multiply all rows."""
        self.scale *= factor
        if factor != 1.0:
            self.rows_UD = self.rows_UD * factor

    def write(self, slots_U: Tensor, rows_UD: Tensor) -> None:
        """Set distinct slots, given in ascending order."""
        kept = ~torch.isin(self.slots_U, slots_U)
        self.slots_U, order = torch.cat([self.slots_U[kept], slots_U]).sort()
        self.rows_UD = torch.cat([self.rows_UD[kept], rows_UD])[order]

    def copy(self) -> Values:
        """Another one that goes its own way."""
        other = Values(self.table_ND)
        other.scale, other.slots_U, other.rows_UD = self.scale, self.slots_U, self.rows_UD
        return other


@dataclass
class Tokens:
    """Tokens of the sequences of a memory: what they ask for, what they hold, and how strongly it is written."""

    query_SCHk: Tensor
    target_SCD: Tensor
    gate_SC: Tensor
    mask_SC: Tensor | None = None
    """False: padding, which is read for like any token but not written. None: there is none in these sequences."""

    def __len__(self) -> int:
        return self.query_SCHk.shape[1]

    def __getitem__(self, piece: slice) -> Tokens:
        mask_SC = None if self.mask_SC is None else self.mask_SC[:, piece]
        return Tokens(self.query_SCHk[:, piece], self.target_SCD[:, piece], self.gate_SC[:, piece], mask_SC)

    @staticmethod
    def join(pieces: list[Tokens]) -> Tokens:
        """One after the other."""
        if len(pieces) == 1:
            return pieces[0]
        mask_SC = None
        if any(piece.mask_SC is not None for piece in pieces):
            masks = (torch.ones_like(t.gate_SC, dtype=torch.bool) if t.mask_SC is None else t.mask_SC for t in pieces)
            mask_SC = torch.cat(list(masks), 1)
        return Tokens(
            torch.cat([piece.query_SCHk for piece in pieces], 1),
            torch.cat([piece.target_SCD for piece in pieces], 1),
            torch.cat([piece.gate_SC for piece in pieces], 1),
            mask_SC,
        )


@dataclass
class Address:
    """Where tokens read."""

    query_YH2d: Tensor
    index_YH2K: Tensor
    """Sub-keys chosen of each half, best first."""
    score_YH2K: Tensor
    rank_YH2K: Tensor
    """Of each slot, which of the K sub-keys of either half it is made of."""
    slots_YHK: Tensor
    raw_YHK: Tensor
    """Scores of the slots."""
    weights_YHK: Tensor


class Memory:
    """One memory and the sequences that share it: reads for tokens, and writes the chunks that they complete.

    Args:
        config: its settings
        keys: stored sub-keys [H, 2, n, d]
        values: its values
        sequences: how many sequences share it
        official: whether chunks are written as the paper's code does with a cache
    """

    def __init__(self, config: FwPKMConfig, keys: Tensor, values: Values, sequences: int, official: bool) -> None:
        self.config, self.keys_H2nd, self.values = config, keys, values
        self.sequences, self.official = sequences, official
        self.waiting: list[Tokens] = []
        size = config.fwpkm_update_chunk_size
        self.chunk = None if isinstance(size, str) else size
        self.lookahead = config.fwpkm_target_value_lookahead
        self.decay = 1 - config.fwpkm_optimizer_lr * config.fwpkm_optimizer_weight_decay
        self.entropy_weight = 0.0 if config.fwpkm_addr_loss is None else config.fwpkm_addr_loss_weight

    def copy(self) -> Memory:
        """Another one that goes its own way."""
        other = Memory(self.config, self.keys_H2nd, self.values.copy(), self.sequences, self.official)
        other.waiting = list(self.waiting)
        return other

    # Calls

    def __call__(self, tokens: Tokens, frozen: bool) -> Tensor:
        """Reads [S, T, D] of new tokens, which are written unless the memory is frozen."""
        reads, start = [], 0
        while start < len(tokens):
            piece = tokens[start : start + self._room(len(tokens), first=start == 0)]
            address = self.address(piece.query_SCHk)
            reads.append(self.read(address))
            start += len(piece)
            if not frozen:
                self._take(piece, address)
        return torch.cat(reads, 1)

    def finish(self) -> None:
        """Write the tokens that wait for their chunk to fill, as the end of a training sequence does.

        The paper's code has nothing of the kind: its tokens go on waiting.
        """
        if self.waiting and not self.official:
            self._write_chunk(None)

    @property
    def _held(self) -> int:
        return sum(map(len, self.waiting))

    def _room(self, length: int, first: bool) -> int:
        """How many tokens are read at most before there is something to write."""
        if self.chunk is None:  # one chunk, however long
            return length
        if not self.official:
            return self.chunk - self._held
        return self.chunk + self.lookahead - self._held if first else self.chunk

    def _take(self, piece: Tokens, address: Address) -> None:
        """Let tokens wait, and write if they complete a chunk; `address` is theirs."""
        self.waiting.append(piece)
        if self.official:
            if self.chunk is None or self._held >= self.chunk:
                self._write_official(address, len(piece))
        elif self._held == self.chunk:
            self._write_chunk(address if len(self.waiting) == 1 else None)

    # Reading

    def address(self, query_SCHk: Tensor) -> Address:
        """Slots and weights of queries."""
        config, count = self.config, self.config.fwpkm_topk
        query_YH2d = query_SCHk.flatten(0, 1).unflatten(-1, (2, -1))
        (score_1, index_1), (score_2, index_2) = (best(self._scores(query_YH2d, half), count) for half in range(2))
        raw, rank_1, rank_2 = best_pairs(score_1, score_2, count)
        slots = index_1.gather(-1, rank_1) * config.fwpkm_n_subkeys + index_2.gather(-1, rank_2)
        return Address(
            query_YH2d,
            torch.stack([index_1, index_2], 2),
            torch.stack([score_1, score_2], 2),
            torch.stack([rank_1, rank_2], 2),
            slots,
            raw,
            self._weights(raw),
        )

    def _scores(self, query_YH2d: Tensor, half: int) -> Tensor:
        """[Y, H, n] of all sub-keys of one half."""
        query_HYd, keys_Hnd = query_YH2d[:, :, half].transpose(0, 1), self.keys_H2nd[:, half]
        if self.config.fwpkm_qk_score_type == "dot_product":
            return (query_HYd @ keys_Hnd.transpose(1, 2)).transpose(0, 1)
        # By differences: the expansion of the square loses the digits that choose between near sub-keys.
        distance = torch.cdist(
            query_HYd.contiguous(), keys_Hnd.contiguous(), compute_mode="donot_use_mm_for_euclid_dist"
        )
        return -torch.log(distance.square() + IDW_EPSILON).transpose(0, 1)

    def _weights(self, raw_YHK: Tensor) -> Tensor:
        """Softmax over all heads' slots of a token together, or silu or relu of each."""
        scaled_YP = (raw_YHK / self.config.fwpkm_score_temperature).flatten(1)
        kind = self.config.fwpkm_score_nonlinear
        weights_YP = scaled_YP.softmax(-1) if kind == "softmax" else getattr(functional, kind)(scaled_YP)
        return weights_YP.view_as(raw_YHK)

    def read(self, address: Address) -> Tensor:
        """[S, C, D]: weighted sums of values."""
        rows_YPD = self.values.read(address.slots_YHK.flatten(1))
        read_YD = (rows_YPD * address.weights_YHK.flatten(1).unsqueeze(-1)).sum(1)
        return read_YD.unflatten(0, (self.sequences, -1))

    # Writing: each token is to read the value of the token `lookahead` further on

    def _write_chunk(self, address: Address | None) -> None:
        """As in training: a chunk of tokens, all of which have read the memory as it still is."""
        tokens, self.waiting = Tokens.join(self.waiting), []
        if address is None:
            address = self.address(tokens.query_SCHk)
        pairs = max(len(tokens) - self.lookahead, 0)
        error_SCD = self.read(address)[:, :pairs] - tokens.target_SCD[:, self.lookahead :][:, :pairs]
        self._write(address, tokens[:pairs], error_SCD, len(tokens), address.slots_YHK)

    def _write_official(self, current: Address, slice_length: int) -> None:
        """As the paper's code with a cache: the last `lookahead` tokens stay; counts are of the current slice alone."""
        queue = Tokens.join(self.waiting)
        pairs = len(queue) - self.lookahead
        if pairs <= 0:
            return
        head = queue[:pairs]
        address = self.address(head.query_SCHk)
        error_SCD = self.read(address) - queue.target_SCD[:, self.lookahead :]
        self._write(address, head, error_SCD, slice_length, current.slots_YHK)
        self.waiting = [queue[pairs:]] if self.lookahead else []

    def _write(self, address: Address, tokens: Tokens, error_SCD: Tensor, length: int, counted: Tensor) -> None:
        """One gradient step: of the memory loss on values, of the addressing loss on sub-keys.

        `tokens` are those with a target, the first of each sequence of `address`; `length` is that of the chunk;
        `counted` are the slots whose reads divide the step.
        """
        gated = self.config.fwpkm_weight_loss_with_gates
        weight_SC = tokens.gate_SC if gated else torch.ones_like(tokens.gate_SC)
        # Without padding every token of the chunk is a sample, with it the pairs that are not masked.
        samples = self.sequences * length
        if tokens.mask_SC is not None:
            weight_SC = weight_SC * tokens.mask_SC
            samples = int(tokens.mask_SC.sum())
        keys = self._stepped_keys(address, weight_SC, error_SCD)  # before the values that they may depend on
        self._step_values(address, weight_SC, error_SCD, samples, counted)
        self.keys_H2nd = keys

    def _step_values(
        self, address: Address, weight_SC: Tensor, error_SCD: Tensor, samples: int, counted: Tensor
    ) -> None:
        config, pairs = self.config, error_SCD.shape[1]
        if pairs == 0:
            self.values.decay(self.decay)
            return
        slots_YP, share_YP = (self._of_pairs(x, pairs) for x in (address.slots_YHK, address.weights_YHK))
        slots_U, place_YP = torch.unique(slots_YP, return_inverse=True)
        terms_YPD = (share_YP * weight_SC.flatten().unsqueeze(1)).unsqueeze(-1) * error_SCD.flatten(0, 1).unsqueeze(1)
        gradient_UD = error_SCD.new_zeros(len(slots_U), error_SCD.shape[-1])
        gradient_UD = gradient_UD.index_add(0, place_YP.flatten(), terms_YPD.flatten(0, 1))
        # Each row is divided by how often it was read. The factor is what the means of the paper's code leave.
        factor = samples * config.fwpkm_heads * config.fwpkm_topk / (self.sequences * pairs)
        gradient_UD = gradient_UD * (factor / self._counts(slots_U, counted).to(gradient_UD.dtype)).unsqueeze(1)
        if config.fwpkm_grad_clip:
            gradient_UD = gradient_UD.clamp(-1, 1)
        rows_UD = self.decay * self.values.read(slots_U) - config.fwpkm_optimizer_lr * gradient_UD
        self.values.decay(self.decay)
        self.values.write(slots_U, rows_UD)

    def _of_pairs(self, x_YHK: Tensor, pairs: int) -> Tensor:
        """[S pairs, P] of the first tokens of each sequence."""
        return x_YHK.flatten(1).unflatten(0, (self.sequences, -1))[:, :pairs].flatten(0, 1)

    @staticmethod
    def _counts(slots_U: Tensor, counted: Tensor) -> Tensor:
        """How often each slot is among those counted; at least 1."""
        seen, times = torch.unique(counted, return_counts=True)
        place = torch.searchsorted(seen, slots_U).clamp_max(len(seen) - 1)
        return torch.where(seen[place] == slots_U, times[place], 1)

    def _stepped_keys(self, address: Address, weight_SC: Tensor, error_SCD: Tensor) -> Tensor:
        config, keys = self.config, self.keys_H2nd
        slope_YH2K = torch.zeros_like(address.score_YH2K)
        if self.entropy_weight:
            slope_YH2K = slope_YH2K + self.entropy_weight * self._entropy_slope(address)
        if not config.fwpkm_mem_grad_to_values_only:
            slope_YH2K = slope_YH2K + self._loss_slope(address, weight_SC, error_SCD)
        elif not self.entropy_weight:
            return keys * self.decay
        gradient = self._key_gradient(address, slope_YH2K)
        if config.fwpkm_grad_clip:
            gradient = gradient.clamp(-1, 1)
        return keys * self.decay - config.fwpkm_optimizer_lr * gradient

    def _key_gradient(self, address: Address, slope_YH2K: Tensor) -> Tensor:
        """[H, 2, n, d] of a loss with these slopes to the scores of chosen sub-keys."""
        heads, _, subkeys, width = self.keys_H2nd.shape
        first_H2 = torch.arange(2 * heads, device=slope_YH2K.device).view(1, heads, 2, 1) * subkeys
        flat_YH2K, flat_keys = address.index_YH2K + first_H2, self.keys_H2nd.flatten(0, 2)
        query_YH21d = address.query_YH2d.unsqueeze(3)
        if self.config.fwpkm_qk_score_type == "dot_product":
            change = query_YH21d
        else:
            difference = flat_keys[flat_YH2K] - query_YH21d
            change = -2 * difference / (difference.square().sum(-1, keepdim=True) + IDW_EPSILON)
        terms = (slope_YH2K.unsqueeze(-1) * change).reshape(-1, width)
        return torch.zeros_like(flat_keys).index_add(0, flat_YH2K.flatten(), terms).view_as(self.keys_H2nd)

    def _entropy_slope(self, address: Address) -> Tensor:
        """Of the negative entropy of the sub-keys' mean use, to each score [Y, H, 2, K]."""
        slopes = []
        for half in range(2):
            index_YHK, share_YHK = address.index_YH2K[:, :, half], address.score_YH2K[:, :, half].softmax(-1)
            count = share_YHK[..., 0].numel()
            use_n = share_YHK.new_zeros(self.config.fwpkm_n_subkeys)
            use_n = use_n.index_add(0, index_YHK.flatten(), share_YHK.flatten()) / count
            outer_n = torch.log(use_n + ENTROPY_EPSILON) + use_n / (use_n + ENTROPY_EPSILON)
            outer_YHK = outer_n[index_YHK] / count
            slopes.append(share_YHK * (outer_YHK - (share_YHK * outer_YHK).sum(-1, keepdim=True)))
        return torch.stack(slopes, 2)

    def _loss_slope(self, address: Address, weight_SC: Tensor, error_SCD: Tensor) -> Tensor:
        """Of half the mean memory loss, to each score [Y, H, 2, K]."""
        config, pairs = self.config, error_SCD.shape[1]
        slope_YH2K = torch.zeros_like(address.score_YH2K)
        if pairs == 0:
            return slope_YH2K
        rows_YPD = self.values.read(self._of_pairs(address.slots_YHK, pairs))
        of_weight = (rows_YPD * error_SCD.flatten(0, 1).unsqueeze(1)).sum(-1)
        of_weight = of_weight * weight_SC.flatten().unsqueeze(1) / error_SCD.numel()
        if config.fwpkm_key_gradient == "official":  # a constant to gradients, in the paper's code
            of_weight = of_weight.detach()
        length = len(address.slots_YHK) // self.sequences
        of_weight = functional.pad(of_weight.unflatten(0, (self.sequences, -1)), (0, 0, 0, length - pairs))
        of_weight_YHK = of_weight.flatten(0, 1).view_as(address.raw_YHK)
        scaled_YHK, kind = address.raw_YHK / config.fwpkm_score_temperature, config.fwpkm_score_nonlinear
        if kind == "softmax":
            mean_Y = (address.weights_YHK * of_weight_YHK).flatten(1).sum(-1)
            of_score = address.weights_YHK * (of_weight_YHK - mean_Y[:, None, None])
        elif kind == "silu":
            sigmoid = scaled_YHK.sigmoid()
            of_score = of_weight_YHK * sigmoid * (1 + scaled_YHK * (1 - sigmoid))
        else:
            of_score = of_weight_YHK * (scaled_YHK > 0)
        of_score = (of_score / config.fwpkm_score_temperature).unsqueeze(2).expand_as(slope_YH2K)
        return slope_YH2K.scatter_add(-1, address.rank_YH2K, of_score)


# -- caches -----------------------------------------------------------------------------------------------------------


@dataclass
class LayerState:
    """What one layer keeps of its streams. Tensors are replaced and never changed, so copies may share them."""

    keys: Tensor | None = None
    """Of attention [B, X, G, d]: of all tokens, or of those that a window still reaches."""
    values: Tensor | None = None
    inputs: Tensor | None = None
    """Of the convolution: the last [B, L - 1, C]."""
    state: Tensor | None = None
    """Of the delta rule [B, H, K, V]."""
    memories: list[Memory] = field(default_factory=list)
    """One for each stream, or one for all; none where the layer has none, and before the first call."""

    def select(self, streams: Tensor) -> LayerState:
        """That of the streams of these numbers, which may repeat."""

        def chosen(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.index_select(0, streams.to(x.device))

        memories = self.memories
        if memories and memories[0].sequences == 1:
            memories = [memories[int(stream)].copy() for stream in streams]
        return LayerState(
            chosen(self.keys), chosen(self.values), chosen(self.inputs), chosen(self.state), list(memories)
        )


class FwPKMCache:
    """Attention, delta-rule and memory state of a batch of streams.

    Its tokens can't be taken back: what a memory has written, and what a delta rule has forgotten, can't be undone.
    """

    is_compileable = False

    def __init__(self, config: FwPKMConfig, batch: int) -> None:
        self.config, self.batch = config, batch
        self.modes = modes_of(config)
        self.layers = [LayerState() for _ in range(config.num_hidden_layers)]
        self.seen = 0
        self.mask_BX: Tensor | None = None
        """Which of the tokens seen are real; None: all."""

    def __len__(self) -> int:
        return len(self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, padding included."""
        return self.seen

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: there is no limit."""
        return -1

    def memories(self) -> Iterator[Memory]:
        """Those of all layers."""
        for layer in self.layers:
            yield from layer.memories

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let stream i go on as stream beam_idx[i] would, as beam search does.

        Raises ValueError where streams share one memory: what each of them has written can't be told apart.
        """
        if self.batch > 1 and any(memory.sequences > 1 for memory in self.memories()):
            raise ValueError(
                "streams that share one memory can't be reordered or repeated: load with memory_mode='per_sequence'"
            )
        self.layers = [layer.select(beam_idx) for layer in self.layers]
        if self.mask_BX is not None:
            self.mask_BX = self.mask_BX[beam_idx.to(self.mask_BX.device)]
        self.batch = len(beam_idx)

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each stream `repeats` times."""
        self.reorder_cache(torch.arange(self.batch).repeat_interleave(repeats))

    def copy(self) -> FwPKMCache:
        """Another one that goes its own way."""
        other = FwPKMCache(self.config, self.batch)
        other.seen, other.mask_BX = self.seen, self.mask_BX
        for new, old in zip(other.layers, self.layers, strict=True):
            new.__dict__.update(old.__dict__)
            new.memories = [memory.copy() for memory in old.memories]
        return other

    def crop(self, max_length: int) -> None:
        """Forget all tokens after the first max_length, or the last -max_length: possible where there are none.

        Raises ValueError where there are some.
        """
        length = self.seen + max_length if max_length < 0 else max_length
        if length < self.seen:
            raise ValueError(
                f"a cache of {self.seen} tokens can't be cropped to {length}: what memories have written can't be "
                "undone; compute the tokens to be kept again, with a new cache"
            )

    def finish(self) -> None:
        """Write the tokens that wait for their chunk to fill; the next token starts a new chunk."""
        for memory in self.memories():
            memory.finish()


# -- layers -----------------------------------------------------------------------------------------------------------


@dataclass
class Context:
    """What all layers of a call know of its tokens."""

    cosine: Tensor
    sine: Tensor
    mask_BX: Tensor | None
    """Which of the tokens seen and new are real; None: all."""
    mask_BT: Tensor | None
    """The same of the new tokens."""
    frozen: bool

    def rotate(self, x_BTHd: Tensor) -> Tensor:
        """Turn the first columns of each head by the tokens' positions."""
        width = self.cosine.shape[-1]
        turned, kept = x_BTHd[..., :width], x_BTHd[..., width:]
        first, second = turned.chunk(2, -1)
        return torch.cat([turned * self.cosine + torch.cat([-second, first], -1) * self.sine, kept], -1)


def rotary_tables(rope: Rope, config: FwPKMConfig, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine [B, T, 1, R] for the R columns of a head that turn; frequencies are float32 as in training."""
    frequency, factor = rotary_frequencies(rope, int(config.head_dim * rope.fraction), config.max_position_embeddings)
    kind = torch.promote_types(dtype, torch.float32)
    angles = positions_BT.to(kind).unsqueeze(-1) * frequency.to(positions_BT.device, kind)
    angles = torch.cat([angles, angles], -1).unsqueeze(-2)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def rotary_frequencies(rope: Rope, width: int, trained_length: int) -> tuple[Tensor, float]:
    """Radians per token of each pair of columns, and the factor of cosine and sine; with YaRN (arXiv 2309.00071)."""
    period = rope.theta ** (torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width)
    if rope.yarn is None:
        return 1.0 / period, 1.0
    yarn, stretch = rope.yarn, rope.yarn["factor"]
    length = yarn.get("original_max_position_embeddings") or trained_length

    def pair_that_turns(times: float) -> float:
        return width * math.log(length / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(pair_that_turns(yarn.get("beta_fast") or 32.0)), 0)
    high = min(math.ceil(pair_that_turns(yarn.get("beta_slow") or 1.0)), width - 1)
    span = high - low if high != low else 0.001
    slowed = ((torch.arange(width // 2, dtype=torch.float32, device="cpu") - low) / span).clamp(0, 1)
    factor = yarn.get("attention_factor")
    return slowed / (stretch * period) + (1 - slowed) / period, 0.1 * math.log(
        stretch
    ) + 1 if factor is None else factor


def attend(q_BTHd: Tensor, k_BXGd: Tensor, v_BXGd: Tensor, window: int | None, mask_BX: Tensor | None) -> Tensor:
    """Softmax attention [B, T, H, d] of the last T of X tokens to themselves and those before, or to `window` of them.

    Tokens whose mask is false are not seen; what sees none mixes in 0.
    """
    length, seen = q_BTHd.shape[1], k_BXGd.shape[1]
    if window is None or length <= window:
        return _attend(q_BTHd, k_BXGd, v_BXGd, window, mask_BX)
    parts = []  # in pieces of a window each, so that the cost is that of the window and not of all tokens
    for start in range(0, length, window):
        stop = min(start + window, length)
        reach = slice(max(seen - length + start - window + 1, 0), seen - length + stop)
        mask = None if mask_BX is None else mask_BX[:, reach]
        parts.append(_attend(q_BTHd[:, start:stop], k_BXGd[:, reach], v_BXGd[:, reach], window, mask))
    return torch.cat(parts, 1)


def _attend(q_BTHd: Tensor, k_BXGd: Tensor, v_BXGd: Tensor, window: int | None, mask_BX: Tensor | None) -> Tensor:
    length, seen = q_BTHd.shape[1], k_BXGd.shape[1]
    repeats = q_BTHd.shape[2] // k_BXGd.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q_BTHd, k_BXGd, v_BXGd))
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    if mask_BX is None and (window is None or seen <= window) and length in (1, seen):
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=length > 1)
        return mixed.transpose(1, 2)
    place = torch.arange(seen, device=q.device)
    distance_TX = place[-length:, None] - place
    visible = (distance_TX >= 0) & (distance_TX < (window or seen))
    visible = visible[None, None] if mask_BX is None else visible & mask_BX[:, None, None, :]
    nothing = ~visible.any(-1, keepdim=True)  # a softmax over nothing is not a number
    mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=visible | nothing)
    return mixed.masked_fill(nothing, 0).transpose(1, 2)


class FwPKMAttention(nn.Module):
    """Attention over all tokens or a sliding window, whose output is gated by a sigmoid of the input."""

    def __init__(self, config: FwPKMConfig, sliding: bool) -> None:
        super().__init__()
        self.width, self.window = config.head_dim, config.sliding_window if sliding else None
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * 2 * self.width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.width, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.width, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.width, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.width, config.rms_norm_eps)

    def forward(self, x_BTE: Tensor, context: Context, layer: LayerState | None) -> Tensor:
        """Of normed hidden states, what is added to the residual stream."""
        q_BTHd, gate_BTHd = self.q_proj(x_BTE).unflatten(-1, (-1, 2 * self.width)).chunk(2, -1)
        q_BTHd = context.rotate(self.q_norm(q_BTHd))
        k_BXGd = context.rotate(self.k_norm(self.k_proj(x_BTE).unflatten(-1, (-1, self.width))))
        v_BXGd = self.v_proj(x_BTE).unflatten(-1, (-1, self.width))
        if layer is not None:
            if layer.keys is not None and layer.values is not None:
                k_BXGd, v_BXGd = torch.cat([layer.keys, k_BXGd], 1), torch.cat([layer.values, v_BXGd], 1)
            kept = slice(None) if self.window is None else slice(max(k_BXGd.shape[1] - self.window + 1, 0), None)
            layer.keys, layer.values = k_BXGd[:, kept], v_BXGd[:, kept]
        mask_BX = None if context.mask_BX is None else context.mask_BX[:, -k_BXGd.shape[1] :]
        mixed_BTHd = attend(q_BTHd, k_BXGd, v_BXGd, self.window, mask_BX)
        return self.o_proj((mixed_BTHd * torch.sigmoid(gate_BTHd)).flatten(2))


def unit(x: Tensor) -> Tensor:
    """x over its length."""
    y = wide(x)
    return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + UNIT_EPSILON)).to(x.dtype)


def delta_rule(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, decay_BTH: Tensor, beta_BTH: Tensor, state_BHKV: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gated delta rule: outputs [B, T, H, V] and the state after the last token; in float32 or wider.

    For every head, with a state S that starts as the given one or 0:

        S <- exp(decay_t) S;   S <- S + k_t (beta_t (v_t - S^T k_t))^T;   o_t = S^T q_t / sqrt(K)
    """
    dtype = v_BTHV.dtype
    kind = torch.promote_types(dtype, torch.float32)
    # Heads before tokens: [B, H, T, ...].
    q, k, v, decay, beta = (x.to(kind).transpose(1, 2) for x in (q_BTHK, k_BTHK, v_BTHV, decay_BTH, beta_BTH))
    if state_BHKV is None:
        state_BHKV = k.new_zeros(*k.shape[:2], k.shape[3], v.shape[3])
    rule = delta_rule_by_token if k.shape[2] <= DELTA_LOOP else delta_rule_by_chunk
    with torch.autocast(q.device.type, enabled=False):
        output, state_BHKV = rule(q * k.shape[3] ** -0.5, k, v, decay, beta, state_BHKV.to(kind))
    return output.transpose(1, 2).to(dtype), state_BHKV


def delta_rule_by_token(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """As its definition says; all tensors [B, H, T, ...]."""
    outputs = []
    for t in range(k.shape[2]):
        state = state * decay[:, :, t, None, None].exp()
        missing = v[:, :, t] - (k[:, :, t, None, :] @ state).squeeze(-2)
        state = state + k[:, :, t, :, None] * (beta[:, :, t, None] * missing).unsqueeze(-2)
        outputs.append((q[:, :, t, None, :] @ state).squeeze(-2))
    return torch.stack(outputs, 2), state


def delta_rule_by_chunk(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The same, with matrix products over chunks of tokens; all tensors [B, H, T, ...].

    With g the decays summed from a chunk's start, S its state there and u_t what token t adds to the state,

        u_t = beta_t (v_t - exp(g_t) S^T k_t - sum over s < t of exp(g_t - g_s) (k_s . k_t) u_s),

    a triangular system, solved for all chunks at once but for S: u = solved v - (solved k) S.
    """
    length = k.shape[2]
    extra = -length % DELTA_CHUNK  # tokens of zeros add nothing and forget nothing

    def in_chunks(x: Tensor) -> Tensor:
        padding = (0, extra) if x.dim() == 3 else (0, 0, 0, extra)
        return functional.pad(x, padding).unflatten(2, (-1, DELTA_CHUNK))

    q, k, v, beta = in_chunks(q), in_chunks(k), in_chunks(v), in_chunks(beta).unsqueeze(-1)
    total = in_chunks(decay).cumsum(-1)  # [B, H, chunks, C]
    causal = torch.ones(DELTA_CHUNK, DELTA_CHUNK, dtype=torch.bool, device=k.device).tril()
    faded = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(~causal, -torch.inf).exp()  # [..., t, s]
    total = total.unsqueeze(-1)
    products = ((k @ k.mT) * faded * beta).tril(-1)
    right = torch.cat([v * beta, k * (beta * total.exp())], -1)
    # The diagonal is taken for ones and not read.
    solved = torch.linalg.solve_triangular(products, right, upper=False, unitriangular=True)
    solved_v, solved_k = solved.split((v.shape[-1], k.shape[-1]), -1)
    within = (q @ k.mT) * faded
    before = q * total.exp()
    last = total[..., -1:, :]
    left = (k * (last - total).exp()).mT  # what a token's addition is in the state after the chunk
    outputs = []
    for chunk in range(k.shape[2]):
        added = solved_v[:, :, chunk] - solved_k[:, :, chunk] @ state
        outputs.append(before[:, :, chunk] @ state + within[:, :, chunk] @ added)
        state = last[:, :, chunk].exp() * state + left[:, :, chunk] @ added
    return torch.cat(outputs, 2)[:, :, :length], state


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
        self.A_log = nn.Parameter(torch.zeros(values))
        self.norm = RMSNorm(config.linear_value_head_dim, config.rms_norm_eps, zero_centred=False)
        self.out_proj = nn.Linear(self.value_width, config.hidden_size, bias=False)

    def forward(self, x_BTE: Tensor, context: Context, layer: LayerState | None) -> Tensor:
        """Of normed hidden states, what is added to the residual stream."""
        config, heads = self.config, self.config.linear_num_key_heads
        qkvz, ba = self.in_proj_qkvz(x_BTE), self.in_proj_ba(x_BTE)
        if context.mask_BT is not None:
            qkvz, ba = (x * context.mask_BT.unsqueeze(-1) for x in (qkvz, ba))
        ratio = config.linear_num_value_heads // heads
        key, value = config.linear_key_head_dim, ratio * config.linear_value_head_dim
        q, k, v, z = qkvz.unflatten(-1, (heads, -1)).split((key, key, value, value), -1)
        mixed = self._convolve(torch.cat([part.flatten(2) for part in (q, k, v)], -1), layer)
        q, k, v = functional.silu(mixed).split((self.key_width, self.key_width, self.value_width), -1)
        q, k = (unit(x.unflatten(-1, (heads, -1))).repeat_interleave(ratio, 2) for x in (q, k))
        v = v.unflatten(-1, (heads * ratio, -1))
        beta, step = (part.flatten(2) for part in ba.unflatten(-1, (heads, 2 * ratio)).chunk(2, -1))
        decay = -wide(self.A_log).exp() * functional.softplus(wide(step) + wide(self.dt_bias))
        output, state = delta_rule(q, k, v, decay, beta.sigmoid(), None if layer is None else layer.state)
        if layer is not None:
            layer.state = state
        gate = functional.silu(z.unflatten(-1, (ratio, -1)).flatten(2, 3))
        return self.out_proj((self.norm(output) * gate).flatten(2))

    def _convolve(self, x_BTC: Tensor, layer: LayerState | None) -> Tensor:
        """Each channel on its own, over the last tokens."""
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


class FwPKMSlowQuery(nn.Module):
    """Queries of a slow memory, normed over all heads together."""

    def __init__(self, config: FwPKMConfig) -> None:
        super().__init__()
        width = config.pkm_heads * config.pkm_k_dim
        self.query_mlps = nn.ModuleList([nn.Linear(config.hidden_size, width)])
        self.norm = RMSNorm(width, 1e-6, zero_centred=False)

    def forward(self, x_BTE: Tensor) -> Tensor:
        """[B, T, H k]."""
        return self.norm(self.query_mlps[0](x_BTE))


class FwPKMSlowMemory(nn.Module):
    """Product-key memory with trained values, in place of an MLP."""

    def __init__(self, config: FwPKMConfig) -> None:
        super().__init__()
        self.config = config
        self.query_proj = FwPKMSlowQuery(config)
        self.keys = nn.Parameter(torch.zeros(config.pkm_heads * 2 * config.pkm_n_subkeys, config.pkm_k_dim // 2))
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
        score, rank_1, rank_2 = best_pairs(score_1, score_2, count)
        slots = index_1.gather(-1, rank_1) * config.pkm_n_subkeys + index_2.gather(-1, rank_2)
        rows = wide(self.values(slots.flatten(2)))
        read = (rows * score.softmax(-1).flatten(2).unsqueeze(-1)).sum(2).to(x_BTE.dtype)
        return self.value_proj(read * functional.silu(self.swilu_projection(x_BTE)))


class FwPKMState(nn.Module):
    """The stored memory of a layer: sub-keys and values as files hold them. Calls write what lies over it."""

    def __init__(self, config: FwPKMConfig) -> None:
        super().__init__()
        self.config = config
        heads, subkeys = config.fwpkm_heads, config.fwpkm_n_subkeys
        self.keys = nn.Parameter(torch.zeros(heads * 2 * subkeys, config.fwpkm_k_dim // 2), requires_grad=False)
        self.values = nn.Parameter(torch.zeros(subkeys**2, config.fwpkm_v_dim), requires_grad=False)

    def memory(self, sequences: int, official: bool) -> Memory:
        """A memory that begins as the stored one."""
        config = self.config
        keys = wide(self.keys.detach()).view(config.fwpkm_heads, 2, config.fwpkm_n_subkeys, -1)
        return Memory(config, keys, Values(self.values.detach()), sequences, official)

    @torch.no_grad()
    def store(self, memory: Memory) -> None:
        """Keep what a memory has written over the table that it began from.

        In new tensors: caches that are still in use, and backward passes, need the ones that were.
        """
        values = memory.values
        table_ND = values.table_ND * values.scale
        table_ND[values.slots_U] = values.rows_UD.to(table_ND.dtype)
        self.values.data = table_ND
        self.keys.data = memory.keys_H2nd.flatten(0, 2).to(self.keys.dtype, copy=True)


def zscore(x: Tensor) -> Tensor:
    """(x - mean) / (deviation + epsilon) over the last axis."""
    y = wide(x)
    centred = y - y.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / max(x.shape[-1] - 1, 1)
    positive = variance > 0  # the root has no slope at 0
    deviation = variance.where(positive, 1).sqrt().where(positive, 0)
    return (centred / (deviation + ZSCORE_EPSILON)).to(x.dtype)


class FwPKMDecoderLayer(nn.Module):
    """h += memory(h), where there is one; h += mixer(norm h); h += mlp(norm h)."""

    def __init__(self, config: FwPKMConfig, index: int) -> None:
        super().__init__()
        self.config = config
        hidden, epsilon = config.hidden_size, config.rms_norm_eps
        self.has_memory = index in config.fwpkm_layers
        self.has_slow_memory = index in config.pkm_layers
        self.is_linear = config.layer_types[index] == "linear_attention"
        self.input_layernorm = RMSNorm(hidden, epsilon)
        self.post_attention_layernorm = RMSNorm(hidden, epsilon)
        if self.is_linear:
            self.linear_attn = FwPKMGatedDeltaNet(config)
        else:
            self.self_attn = FwPKMAttention(config, sliding=config.layer_types[index] == "sliding_attention")
        if self.has_slow_memory:
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

    def forward(self, h_BTE: Tensor, context: Context, layer: LayerState | None, memories: list[Memory]) -> Tensor:
        """Residual stream in, residual stream out."""
        if self.has_memory:
            h_BTE = h_BTE + self._remember(h_BTE, context, memories)
        x_BTE = self.input_layernorm(h_BTE)
        mixer = self.linear_attn if self.is_linear else self.self_attn
        h_BTE = h_BTE + mixer(x_BTE, context, layer)
        x_BTE = self.post_attention_layernorm(h_BTE)
        return h_BTE + (self.pkm(x_BTE) if self.has_slow_memory else self.mlp(x_BTE))

    def _remember(self, h_BTE: Tensor, context: Context, memories: list[Memory]) -> Tensor:
        config = self.config
        query_BTHk = self.fw_q_proj(self.fw_q_norm(h_BTE)).unflatten(-1, (config.fwpkm_heads, -1))
        value_BTD = self.fw_v_proj(self.fw_v_norm(h_BTE))
        if config.fwpkm_compress_value:
            value_BTD = zscore(value_BTD)
        gate_BT = torch.sigmoid(self.fw_out_gate(self.fw_out_gate_norm(h_BTE)).mean(-1))
        tokens = Tokens(wide(query_BTHk), wide(value_BTD), wide(gate_BT))
        with torch.autocast(h_BTE.device.type, enabled=False):
            if config.memory_mode == "shared":
                # Padding counts as tokens of the chunks, as in training.
                tokens.mask_SC = context.mask_BT
                read_BTD = memories[0](tokens, context.frozen)
            else:
                rows = range(len(memories))
                read_BTD = torch.cat([read_row(tokens, row, memories[row], context) for row in rows])
        read_BTD = read_BTD.to(value_BTD.dtype)
        if config.fwpkm_out_fuse_gate:
            share = gate_BT.unsqueeze(-1).to(value_BTD.dtype)
            read_BTD = share * read_BTD + (1 - share) * value_BTD
        return self.fw_out_proj(self.fw_out_norm(read_BTD))


def read_row(tokens: Tokens, row: int, memory: Memory, context: Context) -> Tensor:
    """[1, T, D] of one sequence with a memory of its own, where padding is no token at all and reads 0."""
    query, target, gate = (x[row : row + 1] for x in (tokens.query_SCHk, tokens.target_SCD, tokens.gate_SC))
    if context.mask_BT is None:
        return memory(Tokens(query, target, gate), context.frozen)
    real = context.mask_BT[row].nonzero().view(-1)
    if real.numel() == 0:
        return torch.zeros_like(target)
    read = memory(Tokens(query[:, real], target[:, real], gate[:, real]), context.frozen)
    return torch.zeros_like(target).index_copy(1, real, read)


# -- models -----------------------------------------------------------------------------------------------------------


class FwPKMPreTrainedModel(PreTrainedModel):
    """What both models share: how they are initialized, loaded and saved."""

    config_class = FwPKMConfig
    base_model_prefix = "model"
    _no_split_modules: ClassVar[list[str]] = ["FwPKMDecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _keep_in_fp32_modules_strict: tuple[str, ...] | None = ("fwpkm",)  # each write is too small for 16 bits
    _supports_sdpa = True
    _is_stateful = True  # no kind of generation may take tokens back

    def __init__(self, config: FwPKMConfig) -> None:
        config.check()  # from_pretrained() sets its arguments after the configuration was made
        super().__init__(config)
        if not config.fwpkm_layers:
            self._keep_in_fp32_modules_strict = None  # transformers 4 refuses names that no module has

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As at the start of training. Functions of torch.nn.init leave alone what a file has given."""
        config, init = self.config, nn.init
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Embedding):
            init.normal_(module.weight, std=config.initializer_range)
            if isinstance(bias := getattr(module, "bias", None), Tensor):
                init.zeros_(bias)
        elif isinstance(module, RMSNorm):
            init.constant_(module.weight, 0.0 if module.zero_centred else 1.0)
        elif isinstance(module, FwPKMState):
            bound = config.fwpkm_k_dim**-0.5
            init.uniform_(module.keys, -bound, bound)
            init.normal_(module.values, std=config.fwpkm_v_dim**-0.5)
        elif isinstance(module, FwPKMSlowMemory):
            bound = config.pkm_k_dim**-0.5
            init.uniform_(module.keys, -bound, bound)
            init.normal_(module.values.weight, std=config.pkm_v_dim**-0.5)
        elif isinstance(module, FwPKMGatedDeltaNet):
            init.ones_(module.dt_bias)
            if not getattr(module.A_log, "_is_hf_initialized", False):
                module.A_log.uniform_(1e-6, 16).log_()


class FwPKMModel(FwPKMPreTrainedModel):
    """Embedding, blocks and norm: hidden states of tokens."""

    def __init__(self, config: FwPKMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(FwPKMDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding."""
        self.embed_tokens = value

    def make_cache(self, batch: int) -> FwPKMCache:
        """Empty streams, whose memories begin as the stored ones at their first call."""
        return FwPKMCache(self.config, batch)

    def memories(self, batch: int, *, official: bool = False) -> list[list[Memory]]:
        """Of each layer its new memories: one for each sequence, one for all, or none in layers that have none."""
        shared = self.config.memory_mode == "shared"
        count, sequences = (1, batch) if shared else (batch, 1)
        return [
            [cast(FwPKMState, layer.fwpkm).memory(sequences, official) for _ in range(count)]
            if layer.has_memory
            else []
            for layer in self.layers
        ]

    def check_carried(self, streams: int) -> None:
        """Raise ValueError where the memories of so many streams are not one, which could be stored."""
        if streams > 1 and self.config.memory_mode != "shared" and self.config.fwpkm_layers:
            raise ValueError(
                f"carry_memory stores one memory, but {streams} sequences would write one each: give one sequence, or "
                "load with memory_mode='shared'"
            )

    def store(self, memories: list[list[Memory]]) -> None:
        """Make what memories have written, unfinished chunks included, the stored memory of each layer."""
        for layer, own in zip(self.layers, memories, strict=True):
            for memory in own:
                memory.finish()
                cast(FwPKMState, layer.fwpkm).store(memory)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: FwPKMCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        freeze_memory: bool | None = None,
        carry_memory: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Hidden states [B, T, E] of tokens that continue the streams of a cache, or stand alone.

        Without a cache memories are written within the call and dropped, and gradients flow. With one (`use_cache`,
        or `past_key_values` of a call before) they go on in the next call, and there are no gradients. None takes
        the configuration's `freeze_memory` and `carry_memory`; the latter is for calls without a cache.

        `attention_mask` [B, X] is 1 for each real token seen or new, and 0 for padding, which stands left of them.

        Raises ValueError for what does not fit together, TypeError for arguments that mean nothing here.
        """
        refuse_unknown(kwargs)
        check_devices(self)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them")
        h_BTE = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if not h_BTE.shape[0] * h_BTE.shape[1]:
            raise ValueError(f"there is nothing to read: the tokens have shape {tuple(h_BTE.shape[:2])}")
        batch, config = h_BTE.shape[0], self.config
        cache = self.make_cache(batch) if past_key_values is None and use_cache else past_key_values
        check_cache(cache, batch, config)
        frozen = config.freeze_memory if freeze_memory is None else freeze_memory
        carried = (config.carry_memory if carry_memory is None else carry_memory) and cache is None and not frozen
        if carried:
            self.check_carried(batch)
        context = self._context(h_BTE, attention_mask, position_ids, cache, frozen)
        memories = self.memories(batch) if cache is None else self._memories_of(cache)
        states: list[Tensor] = []
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            for index, layer in enumerate(self.layers):
                states.append(h_BTE)
                h_BTE = layer(h_BTE, context, None if cache is None else cache.layers[index], memories[index])
            h_BTE = self.norm(h_BTE)
        if cache is not None:
            cache.seen += h_BTE.shape[1]
            cache.mask_BX = context.mask_BX
        if carried:
            self.store(memories)
        wanted = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = BaseModelOutputWithPast(h_BTE, cache, (*states, h_BTE) if wanted else None)
        return output if return_dict or (return_dict is None and config.return_dict) else output.to_tuple()

    def _memories_of(self, cache: FwPKMCache) -> list[list[Memory]]:
        """A cache's memories, which begin with its first call."""
        if cache.seen == 0:
            fresh = self.memories(cache.batch, official=self.config.cache_mode == "official")
            for layer, own in zip(cache.layers, fresh, strict=True):
                layer.memories = own
        return [layer.memories for layer in cache.layers]

    def _context(
        self, h_BTE: Tensor, given: Tensor | None, positions: Tensor | None, cache: FwPKMCache | None, frozen: bool
    ) -> Context:
        length, seen = h_BTE.shape[1], 0 if cache is None else cache.seen
        mask_BX = whole_mask(given, h_BTE, cache)
        mask_BT = None if mask_BX is None else mask_BX[:, seen:]
        if positions is None:  # counted without padding
            if mask_BX is None:
                positions = torch.arange(seen, seen + length, device=h_BTE.device).unsqueeze(0)
            else:
                positions = (mask_BX.cumsum(1) - 1).clamp_min(0)[:, seen:]
        cosine, sine = rotary_tables(self.config.rope, self.config, positions, h_BTE.dtype)
        return Context(cosine, sine, mask_BX, mask_BT, frozen)


def refuse_unknown(arguments: dict[str, Any]) -> None:
    """Raise TypeError for arguments of a call that would have an effect in other models and have none here."""
    names = {name for name, value in arguments.items() if value is not None and value is not False}
    unknown = sorted(names - {"cache_position", "num_items_in_batch"})
    if unknown:
        raise TypeError(f"this model takes no {', '.join(unknown)}")


def check_devices(model: nn.Module) -> None:
    """Raise ValueError where parts of a model are elsewhere: memories are used outside of the layers that hold them."""
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise ValueError(
            "the model's weights are on several devices, or offloaded: load it onto one, as with device_map={'': 0}"
        )


def modes_of(config: FwPKMConfig) -> dict[str, str]:
    """The settings that say what the memories of a cache are."""
    return {"memory_mode": config.memory_mode, "cache_mode": config.cache_mode}


def check_cache(cache: FwPKMCache | None, batch: int, config: FwPKMConfig) -> None:
    """Raise ValueError for a cache of another kind, batch or mode."""
    if cache is None:
        return
    if not isinstance(cache, FwPKMCache):
        raise ValueError(f"past_key_values is a {type(cache).__name__}; use make_cache(batch), or use_cache=True")
    if cache.batch != batch:
        raise ValueError(f"past_key_values has {cache.batch} streams, this call has {batch}")
    if cache.modes != modes_of(config):
        raise ValueError(
            f"past_key_values was made with {cache.modes}, and the model now has {modes_of(config)}: make another cache"
        )


def whole_mask(given: Tensor | None, h_BTE: Tensor, cache: FwPKMCache | None) -> Tensor | None:
    """Bool [B, X] of tokens seen and new, or None where all are real. Raises ValueError for other masks."""
    batch, length = h_BTE.shape[:2]
    seen, before = (0, None) if cache is None else (cache.seen, cache.mask_BX)
    if given is None and before is None:
        return None
    if before is None:
        before = torch.ones(batch, seen, dtype=torch.bool, device=h_BTE.device)
    if given is None:
        return torch.cat([before, before.new_ones(batch, length)], 1)
    if given.shape != (batch, seen + length):
        raise ValueError(
            f"attention_mask has shape {tuple(given.shape)}; expected {(batch, seen + length)}: 1 for each real token "
            "seen or new, 0 for padding"
        )
    mask_BX = given.to(h_BTE.device) > 0
    begins = mask_BX[:, :1].sum(1) + (mask_BX[:, 1:] & ~mask_BX[:, :-1]).sum(1)
    if int(begins.max()) > 1:
        raise ValueError("attention_mask has padding between real tokens; it may stand before or behind them alone")
    if not torch.equal(mask_BX[:, :seen], before):
        raise ValueError("attention_mask says otherwise than before which of the tokens seen are padding")
    return None if bool(mask_BX.all()) else mask_BX


class FwPKMForCausalLM(FwPKMPreTrainedModel, GenerationMixin):
    """Language model; generate() writes its memory as it reads the prompt and as it generates."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: FwPKMConfig) -> None:
        super().__init__(config)
        self.model = FwPKMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding."""
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the head."""
        self.lm_head = value

    def make_cache(self, batch: int) -> FwPKMCache:
        """Empty streams, whose memories begin as the stored ones at their first call."""
        return self.model.make_cache(batch)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: FwPKMCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        freeze_memory: bool | None = None,
        carry_memory: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [B, T, V] or of the last `logits_to_keep` tokens, and the loss where labels are given (-100: not
        counted). All else as in FwPKMModel."""
        base = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
            True,
            freeze_memory,
            carry_memory,
            **kwargs,
        )
        cache = base.past_key_values
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            logits = self.lm_head(base.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(loss, logits, cache, base.hidden_states)
        return output if return_dict or (return_dict is None and self.config.return_dict) else output.to_tuple()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: FwPKMCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The tokens that the cache has not seen.

        `input_ids` are all tokens; with an `attention_mask` of all they may be the new ones alone.
        """
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        inputs: dict[str, Any] = {"attention_mask": attention_mask, "past_key_values": past_key_values}
        passed = ("use_cache", "logits_to_keep", "freeze_memory", "output_hidden_states", "output_attentions")
        inputs |= {name: kwargs[name] for name in passed if name in kwargs}
        if inputs_embeds is not None and seen < inputs_embeds.shape[1]:
            inputs["inputs_embeds"] = inputs_embeds[:, seen:]
        else:
            counted = input_ids if attention_mask is None else attention_mask
            # Behind a prompt of embeddings input_ids are the new tokens, and one comes at a time.
            new = 1 if attention_mask is None and inputs_embeds is not None else counted.shape[1] - seen
            if new < 1:
                raise ValueError(f"past_key_values has seen {seen} tokens and none are left to be read; give more")
            inputs["input_ids"] = input_ids[:, -new:]
        inputs["carry_memory"] = False  # generate() stores what was written, once and at its end
        return inputs

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        *args: Any,
        freeze_memory: bool | None = None,
        carry_memory: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As GenerationMixin.generate(), with two arguments more; None takes the configuration's.

        Args:
            freeze_memory: only read the memory
            carry_memory: afterwards the stored memory holds what the prompt and the generated tokens have written

        Raises ValueError, before any work, for ways of generating that would take tokens back or carry several
        memories.
        """

        def setting(name: str) -> Any:
            if name in kwargs:
                return kwargs[name]
            own, default = getattr(generation_config, name, None), getattr(self.generation_config, name, None)
            return default if own is None else own

        refuse_rollback(setting)
        embeds = kwargs.get("inputs_embeds")
        prompt = next((x for x in (inputs, kwargs.get("input_ids"), embeds) if x is not None), None)
        rows = 1 if prompt is None else prompt.shape[0]
        beams = setting("num_beams") or 1
        streams = rows * max(beams, setting("num_return_sequences") or 1)
        config = self.config
        frozen = config.freeze_memory if freeze_memory is None else freeze_memory
        carried = (config.carry_memory if carry_memory is None else carry_memory) and not frozen
        carried = carried and bool(config.fwpkm_layers)
        if carried:
            self.model.check_carried(streams)
        if beams > 1 and config.memory_mode == "shared" and config.fwpkm_layers:
            raise ValueError("beams can't share a memory: load with memory_mode='per_sequence'")
        cache = kwargs.pop("past_key_values", None)
        if cache is None and (setting("use_cache") is not False or embeds is not None or carried):
            cache = self.make_cache(streams)
        if cache is not None:
            check_cache(cache, streams, config)
            kwargs["past_key_values"] = cache
        result = super().generate(inputs, generation_config, *args, freeze_memory=frozen, **kwargs)
        if carried:
            cache = cache.copy()  # the caller's may go on
            ids_BT = result if isinstance(result, Tensor) else result.sequences
            self.model(ids_BT[:, -1:], past_key_values=cache)  # the last token, which no call has read yet
            self.model.store([layer.memories for layer in cache.layers])
        return result


def refuse_rollback(setting: Any) -> None:
    """Raise ValueError where generate()'s settings, by name, ask for what would take tokens back or be ignored."""
    for name, kind in (
        ("assistant_model", "assisted generation"),
        ("prompt_lookup_num_tokens", "assisted generation"),
        ("assistant_early_exit", "assisted generation"),
        ("use_mtp", "assisted generation"),
        ("penalty_alpha", "contrastive search"),
    ):
        if setting(name):
            raise ValueError(
                f"{name} asks for {kind}, which takes tokens back: what a memory has written can't be undone"
            )
    for name, instead in (
        ("cache_implementation", "these models have a cache of their own"),
        ("prefill_chunk_size", "give the prompt to calls in pieces, and generate() their cache"),
        ("position_ids", "positions are counted by attention_mask"),
    ):
        if setting(name) is not None:
            raise ValueError(f"generate() takes no {name}: {instead}")
