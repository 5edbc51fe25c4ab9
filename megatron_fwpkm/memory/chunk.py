"""One chunk of the memory: read, write, and the backward pass of both, on touched rows only.

Plain functions on tensors; `functional.py` runs them over a sequence under autograd, `cache.py` at inference.

Letters: B sequences, C tokens of the chunk, M memories (1 or B), X = B * C / M tokens of one memory, Y = B * C,
P = heads * topk reads of a token, U touched rows, D value width, G = M * heads * 2, n sub-keys, d = k_dim / 2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fwpkm_kernels import SlotPlan, gather_dot, gather_weighted_sum, plan_slots, scatter_weighted_add
from megatron_fwpkm.memory import addressing
from megatron_fwpkm.memory.addressing import Address, SubkeyPlan, Usage
from megatron_fwpkm.memory.config import MemoryConfig
from megatron_fwpkm.memory.fast_state import MemoryView


@dataclass
class ChunkRead:
    """What reading a chunk found.

    Attributes:
        address: slots and weights of every token
        plan: the distinct slots
        rows_UD: their values before the write
        read_YD: the weighted sums
    """

    address: Address
    plan: SlotPlan
    rows_UD: Tensor
    read_YD: Tensor


@dataclass
class ChunkWrite:
    """The values' step of a chunk, in the form that its backward pass wants.

    Attributes:
        weight_Y: write weight of each token (gate * mask; 0 without a target)
        error_YD: read minus lookahead target (0 without a target)
        step_U: learning rate * scale / reads of each row
        unclipped_UD: where the gradient clamp let the gradient through; None without clamp
        decay: factor of weight decay
    """

    weight_Y: Tensor
    error_YD: Tensor
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


def read_chunk(query_GXd: Tensor, view: MemoryView, config: MemoryConfig) -> ChunkRead:
    """Read the memory as it is now (semantics A.1-4)."""
    address = addressing.address(query_GXd, view.keys_MH2nd, config)
    plan = plan_slots(address.slot_YP)
    rows_UD = view.read_rows(plan.slots_U)
    read_YD = gather_weighted_sum(rows_UD, plan.inverse_XP, address.weight_YP)
    return ChunkRead(address, plan, rows_UD, read_YD)


def write_weights(gate_BC: Tensor | None, mask_BC: Tensor | None, like_BCD: Tensor, config: MemoryConfig) -> Tensor:
    """[B, C] weights of the write at the query positions; 0 for the last `lookahead` tokens of the chunk."""
    batch, length = like_BCD.shape[:2]
    weight = like_BCD.new_ones(batch, length)
    if gate_BC is not None and config.weigh_write_by_gate:
        weight *= gate_BC
    if mask_BC is not None:
        weight *= mask_BC
    weight[:, max(length - config.lookahead, 0) :] = 0
    return weight


def lookahead_errors(read_BCD: Tensor, target_BCD: Tensor, lookahead: int) -> Tensor:
    """[B, C, D] read of token t minus target of token t + lookahead; 0 for the last `lookahead` tokens."""
    pairs = max(read_BCD.shape[1] - lookahead, 0)
    error = torch.zeros_like(read_BCD)
    torch.sub(read_BCD[:, :pairs], target_BCD[:, lookahead:][:, :pairs], out=error[:, :pairs])
    return error


def write_scale(mask_BC: Tensor | None, batch: int, length: int, memories: int, config: MemoryConfig) -> float | Tensor:
    """samples * K * H / pairs of semantics A.6, of each memory: a number, or [M] with a mask."""
    pairs = batch // memories * max(length - config.lookahead, 0)
    if pairs == 0:
        return 0.0
    if mask_BC is None:
        return batch // memories * length * config.reads_per_token / pairs
    samples = mask_BC[:, : length - config.lookahead].unflatten(0, (memories, -1)).sum((1, 2))
    return samples.double() * (config.reads_per_token / pairs)


def row_steps(plan: SlotPlan, scale: float | Tensor, dtype: torch.dtype, config: MemoryConfig) -> Tensor:
    """[U] learning rate * scale / reads of each row."""
    reads_U = plan.counts_U.to(dtype)
    if isinstance(scale, Tensor):
        memory_U = torch.div(plan.slots_U, config.num_slots, rounding_mode="floor")
        return config.learning_rate * scale.to(dtype)[memory_U] / reads_U
    return config.learning_rate * scale / reads_U


def write_values(
    read: ChunkRead, view: MemoryView, weight_Y: Tensor, error_YD: Tensor, step_U: Tensor, config: MemoryConfig
) -> ChunkWrite:
    """One step of the memory loss on the rows that were read (semantics A.6-7)."""
    decay = 1 - config.learning_rate * config.weight_decay
    # The step goes into the weights of the pairs: one pass over the rows less.
    pair_weight = read.address.weight_YP * weight_Y.unsqueeze(1) * step_U[read.plan.inverse_XP]
    unclipped = None
    if config.gradient_clip and config.learning_rate > 0:
        change_UD = scatter_weighted_add(read.plan.segments, error_YD, pair_weight / config.learning_rate)
        unclipped = change_UD.abs() <= 1
        change_UD.clamp_(-1, 1).mul_(-config.learning_rate)
    else:
        change_UD = scatter_weighted_add(read.plan.segments, error_YD, -pair_weight)
    view.write_rows(read.plan.slots_U, read.rows_UD, change_UD, decay)
    return ChunkWrite(weight_Y, error_YD, step_U, unclipped, decay)


def memory_slope(read: ChunkRead, weight_Y: Tensor, error_YD: Tensor, pairs: int) -> Tensor:
    """[Y, P] derivative of half the mean memory loss with respect to the slot weights (values_only=False)."""
    if pairs == 0:
        return torch.zeros_like(read.address.weight_YP)
    along = gather_dot(read.rows_UD, read.plan.inverse_XP, error_YD)
    return along * (weight_Y / (pairs * error_YD.shape[1])).unsqueeze(1)


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
    gradient = usage.score_gradient() if config.has_addressing_loss else torch.zeros_like(usage.share_GXK)
    if slope_YP is not None:
        of_score = addressing.score_gradient_from_weights(
            read.address.weight_YP, addressing.heads_last(read.address.top.score, memories), slope_YP, config
        )
        by_head = addressing.heads_first(of_score, memories, config.heads)
        gradient = gradient + addressing.spread_to_subkeys(by_head, read.address.top)
    return gradient


def write_keys(read: ChunkRead, view: MemoryView, slope_YP: Tensor | None, config: MemoryConfig) -> KeyWrite:
    """One step of the addressing loss (and, with `slope_YP`, of the memory loss) on the sub-keys (semantics A.8-9)."""
    usage = Usage(read.address.top, view.memories, config)
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
    [Y, D], dL/d write weight [Y], and dL/d slot weight [Y, P] of the write.
    """
    through = row_gradient_UD
    if write.unclipped_UD is not None:
        through = through * write.unclipped_UD
    weight, inverse = read.address.weight_YP, read.plan.inverse_XP
    step_YP = write.step_U[inverse]
    change_YD = gather_weighted_sum(through, inverse, weight * step_YP)  # rho: how the tokens' error moves the loss
    error_gradient = -write.weight_Y.unsqueeze(1) * change_YD
    weight_gradient = -(change_YD * write.error_YD).sum(1)
    slot_weight = -(step_YP * write.weight_Y.unsqueeze(1)) * gather_dot(through, inverse, write.error_YD)
    return output_gradient_YD + error_gradient, error_gradient, weight_gradient, slot_weight


def backward_memory_slope(
    read: ChunkRead, write: ChunkWrite, slope_cotangent_YP: Tensor, pairs: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiates `memory_slope`: dL/d error [Y, D], dL/d write weight [Y], dL/d rows [U, D]."""
    share = 1 / (pairs * write.error_YD.shape[1])
    inverse = read.plan.inverse_XP
    weighted = slope_cotangent_YP * (write.weight_Y * share).unsqueeze(1)
    of_error = gather_weighted_sum(read.rows_UD, inverse, weighted)
    along = gather_dot(read.rows_UD, inverse, write.error_YD)
    of_weight = (slope_cotangent_YP * along).sum(1) * share
    of_rows = scatter_weighted_add(read.plan.segments, write.error_YD, weighted)
    return of_error, of_weight, of_rows
