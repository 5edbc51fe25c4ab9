"""One chunk of the memory: read, write, and the backward pass of both, on touched rows only.

Plain functions on tensors; `functional.py` runs them over a sequence under autograd, `cache.py` at inference. They hold
for one rank and for a group over which the slots are spread: see routing.py for the two sides, tokens and rows.

Letters: B sequences, C tokens of the chunk on this rank, M memories (1 or B), X = B * C / M tokens of one memory,
Y = B * C, P = heads * topk reads of a token, Q and E (token, owner) pairs and reads on the row side, U touched rows,
D value width on this rank, G = M * heads * 2, n sub-keys, d = k_dim / 2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fwpkm_kernels import SlotPlan, gather_dot, gather_weighted_sum, scatter_weighted_add
from megatron_fwpkm.memory import addressing
from megatron_fwpkm.memory.addressing import Address, SubkeyPlan, Usage
from megatron_fwpkm.memory.config import MemoryConfig
from megatron_fwpkm.memory.fast_state import MemoryView
from megatron_fwpkm.memory.routing import LOCAL, ChunkShape, MemoryGroup, Route


@dataclass(frozen=True)
class ChunkSpan:
    """One chunk of a call: which tokens this rank has of it, and how many all ranks have.

    Attributes:
        queries: tokens of this rank whose slots it finds, as columns of the queries
        tokens: tokens of this rank that it reads and writes values for, as columns of gates, masks and results: the
            same ones, but all tokens of the chunk where columns are spread over ranks
        targets: the values that they are written with, as columns of the targets; the tokens that have one come first
        length: tokens of a sequence in the chunk, on all ranks
        pairs: those that have a target
    """

    queries: slice
    tokens: slice
    targets: slice
    length: int
    pairs: int

    @property
    def own_length(self) -> int:
        """Tokens of a sequence that this rank reads and writes values for."""
        return self.tokens.stop - self.tokens.start

    @property
    def own_pairs(self) -> int:
        """Those that have a target."""
        return self.targets.stop - self.targets.start


def chunk_bounds(tokens: int, config: MemoryConfig) -> list[tuple[int, int]]:
    """First and last (exclusive) token of each chunk; the last one may be short."""
    size = tokens if config.chunk_size == "sequence" else int(config.chunk_size)
    return [(start, min(start + size, tokens)) for start in range(0, tokens, max(size, 1))]


def chunk_span(start: int, end: int, lookahead: int) -> ChunkSpan:
    """The chunk of tokens start .. end - 1, all of them on this rank, in the targets' own order."""
    pairs = max(end - start - lookahead, 0)
    return ChunkSpan(slice(start, end), slice(start, end), slice(end - pairs, end), end - start, pairs)


@dataclass
class ChunkRead:
    """What reading a chunk found.

    Attributes:
        address: slots and weights of every token
        route: the way to the rows
        rows_UD: values of this rank's rows before the write
        read_YD: the weighted sums
    """

    address: Address
    route: Route
    rows_UD: Tensor
    read_YD: Tensor

    @property
    def plan(self) -> SlotPlan:
        """This rank's rows and the reads that address them."""
        return self.route.plan


@dataclass
class ChunkWrite:
    """The values' step of a chunk, in the form that its backward pass wants.

    Attributes:
        weight_Y: write weight of each token (gate * mask; 0 without a target)
        error_YD: read minus lookahead target (0 without a target)
        weight_Q, error_QD: the same on the row side
        step_U: learning rate * scale / reads of each row
        unclipped_UD: where the gradient clamp let the gradient through; None without clamp
        decay: factor of weight decay
    """

    weight_Y: Tensor
    error_YD: Tensor
    weight_Q: Tensor
    error_QD: Tensor
    step_U: Tensor
    unclipped_UD: Tensor | None
    decay: float


@dataclass
class ChunkGradients:
    """Gradients of one chunk's inputs: query [G, X, d], target, gate weight, and the memory before the chunk."""

    query_GXd: Tensor
    error_YD: Tensor
    weight_Y: Tensor
    keys_Gnd: Tensor | None


def read_chunk(
    query_GXd: Tensor,
    view: MemoryView,
    config: MemoryConfig,
    group: MemoryGroup = LOCAL,
    shape: ChunkShape | None = None,
) -> ChunkRead:
    """Read the memory as it is now (semantics A.1-4). The chunk's shape is that on all ranks; None: all is here."""
    address = addressing.address(query_GXd, view.keys_MH2nd, config)
    if shape is None:
        shape = ChunkShape(view.memories, query_GXd.shape[1], view.memories)
    route = group.route(address.slot_YP, address.weight_YP, shape)
    plan = route.plan
    rows_UD = view.read_rows(plan.slots_U)
    read_YD = route.to_tokens(gather_weighted_sum(rows_UD, plan.inverse_XP, route.weight, plan.offsets_X))
    return ChunkRead(address, route, rows_UD, read_YD)


def write_weights(
    gate_BC: Tensor | None, mask_BC: Tensor | None, like_BCD: Tensor, pairs: int, config: MemoryConfig
) -> Tensor:
    """[B, C] weights of the write at the query positions; 0 behind the first `pairs` tokens, which have a target."""
    batch, length = like_BCD.shape[:2]
    weight = like_BCD.new_ones(batch, length)
    if gate_BC is not None and config.weigh_write_by_gate:
        weight *= gate_BC
    if mask_BC is not None:
        weight *= mask_BC
    weight[:, pairs:] = 0
    return weight


def lookahead_errors(read_BCD: Tensor, target_BND: Tensor) -> Tensor:
    """[B, C, D] reads of the first N tokens minus the targets; 0 for those behind, which have none."""
    pairs = target_BND.shape[1]
    error = torch.zeros_like(read_BCD)
    torch.sub(read_BCD[:, :pairs], target_BND, out=error[:, :pairs])
    return error


def sequences(batch: int, memories: int, group: MemoryGroup) -> int:
    """Sequences that write one memory together, on all ranks."""
    return batch // memories * group.batches


def write_scale(
    mask_BC: Tensor | None, batch: int, span: ChunkSpan, memories: int, config: MemoryConfig, group: MemoryGroup = LOCAL
) -> float | Tensor:
    """samples * K * H / pairs of semantics A.6, of each memory with rows here: a number; with a mask [tables * M].

    All ranks have a mask, or none: they count its tokens together.
    """
    pairs = sequences(batch, memories, group) * span.pairs
    if pairs == 0:
        return 0.0
    if mask_BC is None:
        return sequences(batch, memories, group) * span.length * config.reads_per_token / pairs
    samples = group.count(mask_BC[:, : span.own_pairs].unflatten(0, (memories, -1)).sum((1, 2)))
    return samples.double() * (config.reads_per_token / pairs)


def row_steps(
    plan: SlotPlan, scale: float | Tensor, dtype: torch.dtype, num_slots: int, config: MemoryConfig
) -> Tensor:
    """[U] learning rate * scale / reads of each row, of tables with `num_slots` rows a memory."""
    reads_U = plan.counts_U.to(dtype)
    if isinstance(scale, Tensor):
        memory_U = torch.div(plan.slots_U, num_slots, rounding_mode="floor")
        return config.learning_rate * scale.to(dtype)[memory_U] / reads_U
    return config.learning_rate * scale / reads_U


def write_values(
    read: ChunkRead, view: MemoryView, weight_Y: Tensor, error_YD: Tensor, step_U: Tensor, config: MemoryConfig
) -> ChunkWrite:
    """One step of the memory loss on the rows that were read (semantics A.6-7)."""
    decay = 1 - config.learning_rate * config.weight_decay
    plan, error, weight = read.plan, *read.route.to_rows(error_YD, weight_Y)
    assert weight is not None
    # The step goes into the weights of the pairs: one pass over the rows less.
    pair_weight = read.route.weight * plan.by_pair(weight) * step_U[plan.inverse_XP]
    unclipped = None
    if config.gradient_clip and config.learning_rate > 0:
        change_UD = scatter_weighted_add(plan.segments, error, pair_weight / config.learning_rate)
        unclipped = change_UD.abs() <= 1
        change_UD.clamp_(-1, 1).mul_(-config.learning_rate)
    else:
        change_UD = scatter_weighted_add(plan.segments, error, -pair_weight)
    view.write_rows(plan.slots_U, read.rows_UD, change_UD, decay)
    return ChunkWrite(weight_Y, error_YD, weight, error, step_U, unclipped, decay)


def memory_slope(read: ChunkRead, write: ChunkWrite, pairs: int, config: MemoryConfig) -> Tensor:
    """[Y, P] derivative of half the mean memory loss with respect to the slot weights (values_only=False).

    `pairs` that write one memory, on all ranks.
    """
    if pairs == 0:
        return torch.zeros_like(read.address.weight_YP)
    along = gather_dot(read.rows_UD, read.plan.inverse_XP, write.error_QD, read.plan.offsets_X)
    return read.route.reads_to_tokens(along * read.plan.by_pair(write.weight_Q / (pairs * config.v_dim)))


@dataclass
class KeyWrite:
    """The sub-keys' step of a chunk: `score_GXK` is the inner loss's gradient of the sub-scores."""

    usage: Usage
    score_GXK: Tensor | None
    plan: SubkeyPlan | None
    unclipped_Gnd: Tensor | None


def inner_score_gradient(
    usage: Usage, read: ChunkRead, slope_YP: Tensor | None, memories: int, config: MemoryConfig
) -> Tensor:
    """Gradient [G, X, K] of the inner losses with respect to the sub-scores."""
    gradient = usage.score_gradient() if config.has_addressing_loss else torch.zeros_like(read.address.top.sub_score)
    if slope_YP is not None:
        of_score = addressing.score_gradient_from_weights(
            read.address.weight_YP, addressing.heads_last(read.address.top.score, memories), slope_YP, config
        )
        by_head = addressing.heads_first(of_score, memories, config.heads)
        gradient = gradient + addressing.spread_to_subkeys(by_head, read.address.top)
    return gradient


def write_keys(
    read: ChunkRead,
    view: MemoryView,
    slope_YP: Tensor | None,
    tokens: int,
    config: MemoryConfig,
    group: MemoryGroup = LOCAL,
) -> KeyWrite:
    """One step of the addressing loss (and, with `slope_YP`, of the memory loss) on the sub-keys (semantics A.8-9).

    `tokens` of one memory, on all ranks; every rank takes the same step.
    """
    usage = Usage(read.address.top, view.memories, tokens, config, group)
    decay = 1 - config.learning_rate * config.weight_decay
    keys = view.keys_MH2nd
    if not config.moves_keys:
        if decay != 1:
            view.write_keys(keys * decay)
        return KeyWrite(usage, None, None, None)
    score = inner_score_gradient(usage, read, slope_YP, view.memories, config)
    plan = addressing.plan_subkeys(read.address.top, config.n_subkeys)
    keys_Gnd = keys.flatten(0, 2)
    gradient = addressing.key_gradient(read.address.query_GXd, keys_Gnd, read.address.top, plan, score, config)
    gradient = group.sum(gradient)
    unclipped = None
    if config.gradient_clip:
        unclipped = gradient.abs() <= 1
        gradient.clamp_(-1, 1)
    gradient.mul_(-config.learning_rate)
    view.write_keys(torch.add(gradient.view(keys.shape), keys, alpha=decay))
    return KeyWrite(usage, score, plan, unclipped)


def backward_values(
    read: ChunkRead,
    write: ChunkWrite,
    output_gradient_YD: Tensor,
    row_gradient_UD: Tensor,
    config: MemoryConfig,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Backward of the write, the part that does not touch the scores' own chain.

    `row_gradient_UD` is dL/d of the rows after the write. Returns dL/d read [Y, D] (in all), dL/d error of the write
    [Y, D], dL/d write weight [Y] (the term of this rank's columns), and, on the row side, dL/d slot weight of the
    write.
    """
    through = row_gradient_UD
    if write.unclipped_UD is not None:
        through = through * write.unclipped_UD
    plan = read.plan
    inverse, offsets, step = plan.inverse_XP, plan.offsets_X, write.step_U[plan.inverse_XP]
    # rho: how the tokens' error moves the loss
    change_YD = read.route.to_tokens(gather_weighted_sum(through, inverse, read.route.weight * step, offsets))
    error_gradient = -write.weight_Y.unsqueeze(1) * change_YD
    weight_gradient = -(change_YD * write.error_YD).sum(1)
    slot_weight = -(step * plan.by_pair(write.weight_Q)) * gather_dot(through, inverse, write.error_QD, offsets)
    return output_gradient_YD + error_gradient, error_gradient, weight_gradient, slot_weight


def backward_memory_slope(
    read: ChunkRead, write: ChunkWrite, slope_cotangent_YP: Tensor, pairs: int, config: MemoryConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiates `memory_slope`: dL/d error [Y, D], dL/d write weight [Y], dL/d rows [U, D].

    As that of `backward_values`, dL/d write weight is the term of this rank's columns.
    """
    share = 1 / (pairs * config.v_dim)
    plan, route = read.plan, read.route
    cotangent = route.reads_to_rows(slope_cotangent_YP)
    along_YD = route.to_tokens(gather_weighted_sum(read.rows_UD, plan.inverse_XP, cotangent * share, plan.offsets_X))
    of_rows = scatter_weighted_add(plan.segments, write.error_QD, cotangent * plan.by_pair(write.weight_Q * share))
    return along_YD * write.weight_Y.unsqueeze(1), (along_YD * write.error_YD).sum(1), of_rows
