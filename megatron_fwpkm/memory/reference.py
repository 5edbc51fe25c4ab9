"""The memory's mathematics, dense and obvious: the yardstick of every fast path (semantics A and B).

Every write is a gradient step taken by autograd with `create_graph`, so the outer gradient is whatever autograd says.
Costs O(N) time and memory per chunk. `matmul_scores=True` is the variant that the benchmark compares against: scores
from one matrix product and `torch.topk` (ties in any order), as a competent implementation without sparse tricks has.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fwpkm_kernels.reference import stable_topk
from fwpkm_kernels.topk import IDW_EPSILON
from megatron_fwpkm.memory.config import MemoryConfig

ENTROPY_EPSILON = 1e-8


@dataclass
class ReferenceOutput:
    """What one call of the reference computes.

    Attributes:
        read_BTD: memory outputs, before gating
        losses: [B, pairs] memory losses at their query positions, detached
        addressing_loss: mean over the chunks, detached
        slots_BTHK, weights_BTHK: slots read and their weights
        keys_final, values_final: memory after the call, connected to the graph
    """

    read_BTD: Tensor
    losses: Tensor
    addressing_loss: Tensor
    slots_BTHK: Tensor
    weights_BTHK: Tensor
    keys_final: Tensor
    values_final: Tensor


def reference_memory(
    query_BTHk: Tensor,
    target_BTD: Tensor,
    gate_BT: Tensor | None,
    mask_BT: Tensor | None,
    keys_H2nd: Tensor,
    values_ND: Tensor,
    config: MemoryConfig,
    *,
    matmul_scores: bool = False,
) -> ReferenceOutput:
    """Read and write one memory, shared by all sequences of the batch, chunk after chunk.

    Shapes: query [B, T, H, k_dim], target [B, T, D] (the z-scored value of every token, not shifted), gate [B, T] or
    None, mask [B, T] bool or None, keys [H, 2, n, k_dim / 2], values [N, D].
    """
    tokens = query_BTHk.shape[1]
    chunk = tokens if config.chunk_size == "sequence" else config.chunk_size
    keys, values = keys_H2nd, values_ND
    reads, losses, addressing, slots, weights = [], [], [], [], []
    with torch.enable_grad():
        if not keys.requires_grad:
            keys = keys.detach().requires_grad_()
        if not values.requires_grad:
            values = values.detach().requires_grad_()
        for start in range(0, tokens, max(chunk, 1)):
            piece = slice(start, min(start + chunk, tokens))
            gate = None if gate_BT is None else gate_BT[:, piece]
            mask = None if mask_BT is None else mask_BT[:, piece]
            address = _address(query_BTHk[:, piece], keys, config, matmul_scores)
            read = _read(values, address.slots, address.weights)
            keys, values, loss, addressing_loss = _write(
                address, read, target_BTD[:, piece], gate, mask, keys, values, config
            )
            reads.append(read)
            losses.append(loss)
            addressing.append(addressing_loss)
            slots.append(address.slots)
            weights.append(address.weights)
    return ReferenceOutput(
        torch.cat(reads, 1),
        torch.cat(losses, 1),
        torch.stack(addressing).mean(),
        torch.cat(slots, 1),
        torch.cat(weights, 1).detach(),
        keys,
        values,
    )


@dataclass
class _Address:
    slots: Tensor  # [B, C, H, K]
    weights: Tensor  # [B, C, H, K]
    subkeys: list[tuple[Tensor, Tensor]]  # per half: indices and scores of the top-k, each [B, C, H, K]


def _subkey_scores(query: Tensor, keys: Tensor, config: MemoryConfig, matmul_scores: bool) -> Tensor:
    """[B, C, H, n] scores of one half: query [B, C, H, d], keys [H, n, d]."""
    if matmul_scores:
        product = torch.einsum("bchd,hnd->bchn", query, keys)
        if config.score_type == "dot_product":
            return product
        square = query.square().sum(-1, keepdim=True) + keys.square().sum(-1) - 2 * product
        return -torch.log(square.clamp_min(0) + IDW_EPSILON)
    if config.score_type == "dot_product":
        return (query.unsqueeze(3) * keys).sum(-1)
    return -torch.log((query.unsqueeze(3) - keys).square().sum(-1) + IDW_EPSILON)


def _address(query: Tensor, keys: Tensor, config: MemoryConfig, matmul_scores: bool) -> _Address:
    best = torch.topk if matmul_scores else stable_topk
    halves = query.unflatten(-1, (2, -1))
    subkeys = []
    for half in range(2):
        scores = _subkey_scores(halves[..., half, :], keys[:, half], config, matmul_scores)
        top, index = best(scores, config.topk)
        subkeys.append((index, top))
    (index_1, top_1), (index_2, top_2) = subkeys
    sums = (top_1.unsqueeze(-1) + top_2.unsqueeze(-2)).flatten(-2)
    score, position = best(sums, config.topk)
    row, column = torch.div(position, config.topk, rounding_mode="floor"), position % config.topk
    slots = index_1.gather(-1, row) * config.n_subkeys + index_2.gather(-1, column)
    scaled = (score / config.temperature).flatten(-2)  # one list of H * K scores for a token
    nonlinearity = {
        "softmax": lambda x: x.softmax(-1),
        "silu": torch.nn.functional.silu,
        "relu": torch.relu,
    }[config.score_nonlinearity]
    return _Address(slots, nonlinearity(scaled).view_as(score), subkeys)


def _read(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    rows = torch.nn.functional.embedding(slots.flatten(2), values)
    return (rows * weights.flatten(2).unsqueeze(-1)).sum(2)


def _addressing_loss(address: _Address, config: MemoryConfig) -> Tensor:
    """Negative entropy of the mean use of sub-keys, over exactly the top-k entries of each row (semantics A.8)."""
    total = address.weights.new_zeros(())
    for index, score in address.subkeys:
        share = score.softmax(-1)
        rows = share[..., 0].numel()
        mean = share.new_zeros(config.n_subkeys).index_add(0, index.flatten(), share.flatten()) / rows
        total = total + (mean * torch.log(mean + ENTROPY_EPSILON)).sum()
    return config.addressing_loss_weight * total


def _write(
    address: _Address,
    read: Tensor,
    target: Tensor,
    gate: Tensor | None,
    mask: Tensor | None,
    keys: Tensor,
    values: Tensor,
    config: MemoryConfig,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One gradient step after a chunk (semantics A.5-9): new keys, new values, losses [B, pairs], addressing loss."""
    batch, length = read.shape[:2]
    pairs = max(length - config.lookahead, 0)
    weight = read.new_ones(batch, pairs)
    if gate is not None and config.weigh_write_by_gate:
        weight = weight * gate[:, :pairs]
    if mask is not None:
        weight = weight * mask[:, :pairs]
    error = read[:, :pairs] - target[:, config.lookahead :][:, :pairs]
    loss = weight * error.square().mean(-1)

    samples = batch * length if mask is None else mask[:, :pairs].sum().to(read.dtype)
    decay = 1 - config.learning_rate * config.weight_decay
    new_values = values if decay == 1 else decay * values
    if pairs:
        objective = 0.5 * (weight * error.square().sum(-1)).sum()
        (gradient,) = torch.autograd.grad(objective, values, create_graph=True)
        counts = torch.bincount(address.slots.flatten(), minlength=config.num_slots).clamp_min(1).to(values.dtype)
        scale = samples * config.reads_per_token / (batch * pairs)
        gradient = gradient * (scale / counts).unsqueeze(1)
        if config.gradient_clip:
            gradient = gradient.clamp(-1, 1)
        new_values = torch.add(new_values, gradient, alpha=-config.learning_rate)

    key_objective = addressing_loss = _addressing_loss(address, config)
    if not config.has_addressing_loss:
        key_objective = addressing_loss = addressing_loss * 0
    if not config.values_only and pairs:
        key_objective = key_objective + _memory_loss_for_keys(address, error, weight, loss, values, config)
    new_keys = keys if decay == 1 else decay * keys
    if config.moves_keys:
        (key_gradient,) = torch.autograd.grad(key_objective, keys, create_graph=True)
        if config.gradient_clip:
            key_gradient = key_gradient.clamp(-1, 1)
        new_keys = torch.add(new_keys, key_gradient, alpha=-config.learning_rate)
    return new_keys, new_values, loss.detach(), addressing_loss.detach()


def _memory_loss_for_keys(
    address: _Address, error: Tensor, weight: Tensor, loss: Tensor, values: Tensor, config: MemoryConfig
) -> Tensor:
    """Half the mean memory loss as a function of the sub-keys; "official" takes d loss / d weights as constant."""
    if config.key_gradient == "exact":
        return 0.5 * loss.mean()
    pairs = error.shape[1]
    rows = torch.nn.functional.embedding(address.slots[:, :pairs].flatten(2), values)
    slope = (rows * error.unsqueeze(2)).sum(-1) * (weight / (loss.numel() * error.shape[-1])).unsqueeze(-1)
    return (slope.detach() * address.weights[:, :pairs].flatten(2)).sum()
