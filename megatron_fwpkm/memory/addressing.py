"""Addressing: from queries to slots and weights, and every gradient that flows through it, in closed form.

Forward (semantics A.1-3) and the addressing loss (A.8-9) use only the top-k sub-keys of each query, so both passes are
sparse in the sub-keys: gather-weighted-sum, scatter-add and gather-dot over [queries, K] pairs. Nothing of size
queries x n outlives the top-k itself.

Letters: M memories, H heads, G = M * H * 2 (halves innermost), X tokens of one memory in a chunk, Y = M * X tokens in
all, K top-k, P = H * K reads of one token, n sub-keys, d = k_dim / 2, D value width.
"""

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fwpkm_kernels import (
    ProductKeyTopk,
    Segments,
    gather_dot,
    gather_weighted_sum,
    plan_segments,
    product_key_topk,
    scatter_weighted_add,
)
from megatron_fwpkm.memory.config import MemoryConfig
from megatron_fwpkm.memory.routing import LOCAL, MemoryGroup

ENTROPY_EPSILON = 1e-8


@dataclass
class Address:
    """Where the tokens of a chunk read.

    Attributes:
        query_GXd: query halves
        top: the product-key top-k of each query
        slot_YP: [Y, P] int64, slots in the numbering memory * N + slot
        weight_YP: [Y, P], weights after the nonlinearity
    """

    query_GXd: Tensor
    top: ProductKeyTopk
    slot_YP: Tensor
    weight_YP: Tensor


def split_queries(query_MXHk: Tensor) -> Tensor:
    """[M, X, H, k_dim] to halves [G, X, d], contiguous."""
    halves = query_MXHk.unflatten(-1, (2, -1)).permute(0, 2, 3, 1, 4)
    return halves.flatten(0, 2).contiguous()


def merge_queries(query_GXd: Tensor, memories: int) -> Tensor:
    """The inverse of `split_queries`."""
    halves = query_GXd.unflatten(0, (memories, -1, 2)).permute(0, 3, 1, 2, 4)
    return halves.flatten(-2)


def heads_last(value_GXK: Tensor, memories: int) -> Tensor:
    """[M * H, X, K] to token-major [Y, P]."""
    return value_GXK.unflatten(0, (memories, -1)).transpose(1, 2).flatten(2).flatten(0, 1)


def heads_first(value_YP: Tensor, memories: int, heads: int) -> Tensor:
    """The inverse of `heads_last`."""
    return value_YP.unflatten(0, (memories, -1)).unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1)


def address(query_GXd: Tensor, keys_MH2nd: Tensor, config: MemoryConfig) -> Address:
    """Find the slots of every token and their weights."""
    memories = keys_MH2nd.shape[0]
    top = product_key_topk(query_GXd, keys_MH2nd.flatten(0, 2), config.topk, config.score_type)
    slot_YP = heads_last(top.slot, memories)
    if memories > 1:
        first_slot = torch.arange(memories, device=slot_YP.device) * config.num_slots
        slot_YP = slot_YP + first_slot.repeat_interleave(slot_YP.shape[0] // memories).unsqueeze(1)
    weight_YP = _nonlinearity(heads_last(top.score, memories) / config.temperature, config).to(query_GXd.dtype)
    top = dataclasses.replace(top, score=top.score.to(query_GXd.dtype))
    return Address(query_GXd, top, slot_YP, weight_YP)


def _nonlinearity(scaled: Tensor, config: MemoryConfig) -> Tensor:
    if config.score_nonlinearity == "softmax":
        return scaled.softmax(-1)
    return F.silu(scaled) if config.score_nonlinearity == "silu" else scaled.relu()


def score_gradient_from_weights(
    weight_YP: Tensor, score_YP: Tensor, weight_gradient_YP: Tensor, config: MemoryConfig
) -> Tensor:
    """dL/d score from dL/d weight, [Y, P], through the nonlinearity and the temperature."""
    if config.score_nonlinearity == "softmax":
        mean = (weight_YP * weight_gradient_YP).sum(-1, keepdim=True)
        return weight_YP * (weight_gradient_YP - mean) / config.temperature
    return _slope(score_YP / config.temperature, config)[0] * weight_gradient_YP / config.temperature


def _slope(scaled: Tensor, config: MemoryConfig) -> tuple[Tensor, Tensor]:
    """First and second derivative of an elementwise nonlinearity."""
    if config.score_nonlinearity == "relu":
        return (scaled > 0).to(scaled.dtype), torch.zeros_like(scaled)
    s = scaled.sigmoid()
    ds = s * (1 - s)
    return s + scaled * ds, ds * (2 + scaled * (1 - 2 * s))


def second_order_through_weights(
    weight_YP: Tensor,
    score_YP: Tensor,
    weight_gradient_YP: Tensor,
    cotangent_YP: Tensor,
    config: MemoryConfig,
) -> tuple[Tensor, Tensor]:
    """Differentiates `score_gradient_from_weights` once more.

    With c the cotangent of its result, returns dL/d score [Y, P] and dL/d weight_gradient [Y, P].
    """
    if config.score_nonlinearity == "softmax":
        mean = (weight_YP * weight_gradient_YP).sum(-1, keepdim=True)
        cotangent_mean = (weight_YP * cotangent_YP).sum(-1, keepdim=True)
        of_weight = cotangent_YP * (weight_gradient_YP - mean) - weight_gradient_YP * cotangent_mean
        of_weight = of_weight / config.temperature
        of_gradient = weight_YP * (cotangent_YP - cotangent_mean) / config.temperature
        return score_gradient_from_weights(weight_YP, score_YP, of_weight, config), of_gradient
    first, second = _slope(score_YP / config.temperature, config)
    of_score = cotangent_YP * second * weight_gradient_YP / config.temperature**2
    return of_score, cotangent_YP * first / config.temperature


def spread_to_subkeys(slot_gradient_GXK: Tensor, top: ProductKeyTopk) -> Tensor:
    """dL/d sub-score [G, X, K] from dL/d slot score [G / 2, X, K]: each slot's score is the sum of two of them.

    A comparison with every rank instead of a scatter: the sums have a fixed order on every device.
    """
    ranks = torch.arange(slot_gradient_GXK.shape[-1], device=slot_gradient_GXK.device)
    chosen = top.rank.unsqueeze(-1) == ranks  # [2, G / 2, X, K, rank]
    spread = torch.where(chosen, slot_gradient_GXK.unsqueeze(-1), 0).sum(-2)
    return spread.transpose(0, 1).flatten(0, 1)


@dataclass
class SubkeyPlan:
    """The sub-keys that a chunk's queries address, flattened over the groups: row = group * n + sub-key."""

    index_GXK: Tensor  # [G * X, K]
    segments: Segments


def plan_subkeys(top: ProductKeyTopk, n_subkeys: int) -> SubkeyPlan:
    """Sort the chosen sub-keys by row, once for all sums over them."""
    groups = top.sub_index.shape[0]
    first_row = torch.arange(groups, device=top.sub_index.device) * n_subkeys
    index = (top.sub_index + first_row[:, None, None]).flatten(0, 1)
    return SubkeyPlan(index, plan_segments(index, groups * n_subkeys))


def _segment_sum(plan: SubkeyPlan, value_GXK: Tensor) -> Tensor:
    """[G * n] float64: sums of one number for each pair, by sub-key. (bincount on CPU adds in order.)"""
    rows = plan.segments.offsets.numel() - 1
    value_GXK = value_GXK.double()
    if value_GXK.device.type == "cpu":
        return torch.bincount(plan.index_GXK.reshape(-1), value_GXK.reshape(-1), minlength=rows).double()
    ones = value_GXK.new_ones(value_GXK.shape[0] * value_GXK.shape[1], 1)
    return scatter_weighted_add(plan.segments, ones, value_GXK.reshape(-1, value_GXK.shape[-1])).squeeze(1)


class Usage:
    """Mean use of the sub-keys, and the addressing loss with its gradients (semantics A.8).

    All of it is float64, and only what it gives, loss and gradients, is rounded to the scores' dtype: near uniform use
    the shares and the logarithms of their means differ in few digits, and there are few of them.

    Attributes:
        share_GXK: softmax of the top-k sub-scores of each query
        mean_M2n: mean share of each sub-key over tokens and heads, per memory and half; 0 without addressing loss
    """

    def __init__(
        self,
        top: ProductKeyTopk,
        memories: int,
        tokens: int,
        config: MemoryConfig,
        group: MemoryGroup = LOCAL,
        mean_M2n: Tensor | None = None,
    ) -> None:
        """`tokens` of one memory, on all ranks of the group; `top` has this rank's. The mean may be known already."""
        self.memories, self.heads, self._group = memories, config.heads, group
        self.n_subkeys = config.n_subkeys
        self.loss_weight = config.addressing_loss_weight if config.has_addressing_loss else 0.0
        self.dtype = top.sub_score.dtype
        self.share_GXK = top.sub_score.double().softmax(-1)
        self.rows = tokens * config.heads
        place = torch.arange(top.sub_index.shape[0], device=top.sub_index.device)
        # Heads are pooled: (memory, head, half) -> (memory, half).
        pooled = torch.div(place, 2 * config.heads, rounding_mode="floor") * 2 + place % 2
        self.bin_GXK = top.sub_index + (pooled * config.n_subkeys)[:, None, None]
        if mean_M2n is None and not self.loss_weight:  # nobody asks: no sum over ranks
            mean_M2n = self.share_GXK.new_zeros(memories, 2, config.n_subkeys)
        if mean_M2n is None:
            mean_M2n = self._pool(self.share_GXK).div_(self.rows).view(memories, 2, config.n_subkeys)
        self.mean_M2n = mean_M2n

    def _pool(self, value_GXK: Tensor) -> Tensor:
        """Sums of numbers of pairs by (memory, half, sub-key), over all ranks, in a fixed order."""
        return self._group.sum(self._pool_own(value_GXK))

    def _pool_own(self, value_GXK: Tensor) -> Tensor:
        bins = self.memories * 2 * self.n_subkeys
        index, value = self.bin_GXK.reshape(-1), value_GXK.reshape(-1)
        if value.device.type == "cpu":
            return torch.bincount(index, value, minlength=bins).double()  # of nothing it counts integers
        summed = scatter_weighted_add(
            plan_segments(index.unsqueeze(1), bins), torch.ones_like(value).unsqueeze(1), value.unsqueeze(1)
        )
        return summed.squeeze(1)

    def loss_M(self) -> Tensor:
        """[M] addressing loss: weight * sum over halves of sum_j mean_j log(mean_j + eps)."""
        entropy = self.mean_M2n * torch.log(self.mean_M2n + ENTROPY_EPSILON)
        return (self.loss_weight * entropy.sum((1, 2))).to(self.dtype)

    def _potential(self) -> Tensor:
        """d loss / d mean for every pair, [G, X, K], less its mean over the use of a half: only differences count."""
        shifted = self.mean_M2n + ENTROPY_EPSILON
        potential = self.loss_weight * (shifted.log() + self.mean_M2n / shifted)
        potential -= (self.mean_M2n * potential).sum(-1, keepdim=True)
        return potential.flatten()[self.bin_GXK]

    def score_gradient(self) -> Tensor:
        """d loss / d sub-score, [G, X, K]."""
        potential = self._potential()
        mean = (self.share_GXK * potential).sum(-1, keepdim=True)
        return (self.share_GXK * (potential - mean) / self.rows).to(self.dtype)

    def score_gradient_backward(self, cotangent_GXK: Tensor) -> Tensor:
        """dL/d sub-score [G, X, K] through `score_gradient`, given dL/d of its result."""
        share, potential, cotangent_GXK = self.share_GXK, self._potential(), cotangent_GXK.double()
        mean = (share * potential).sum(-1, keepdim=True)
        along = (share * cotangent_GXK).sum(-1, keepdim=True)
        of_share = (cotangent_GXK * (potential - mean) - potential * along) / self.rows
        of_potential = self._pool(share * (cotangent_GXK - along) / self.rows)
        shifted = self.mean_M2n.flatten() + ENTROPY_EPSILON
        of_mean = of_potential * self.loss_weight * (1 / shifted + ENTROPY_EPSILON / shifted.square())
        of_share = of_share + (of_mean / self.rows)[self.bin_GXK]
        return (share * (of_share - (share * of_share).sum(-1, keepdim=True))).to(self.dtype)


def _pull(top: ProductKeyTopk, score_gradient_GXK: Tensor, config: MemoryConfig) -> Tensor:
    """Coefficient t of d score / d key: the gradient of a pair is t (q - k) for idw and t q for dot products.

    d(-log(eps + |q - k|^2)) / dk = 2 (q - k) / (eps + |q - k|^2) = 2 exp(score) (q - k).
    """
    if config.score_type == "dot_product":
        return score_gradient_GXK
    return score_gradient_GXK * _slope_of_score(top)


def _slope_of_score(top: ProductKeyTopk) -> Tensor:
    """[G, X, K] 2 exp(score), rounded once."""
    return (2 * torch.exp(top.sub_score.double())).to(top.sub_score.dtype)


def key_gradient(
    query_GXd: Tensor,
    keys_Gnd: Tensor,
    top: ProductKeyTopk,
    plan: SubkeyPlan,
    score_gradient_GXK: Tensor,
    config: MemoryConfig,
) -> Tensor:
    """dL/d keys [G, n, d] from dL/d sub-score [G, X, K]."""
    pull = _pull(top, score_gradient_GXK, config)
    flat = pull.flatten(0, 1)
    gradient = scatter_weighted_add(plan.segments, query_GXd.flatten(0, 1), flat).view_as(keys_Gnd)
    if config.score_type == "dot_product":
        return gradient
    # sum t (q - k) as sum t q - (sum t) k: close to a sub-key they cancel, so the sum of the few numbers is float64.
    total = _segment_sum(plan, pull).to(pull.dtype).view(*keys_Gnd.shape[:2], 1)
    return gradient.addcmul_(total, keys_Gnd, value=-1)


def query_gradient(
    query_GXd: Tensor,
    keys_Gnd: Tensor,
    top: ProductKeyTopk,
    plan: SubkeyPlan,
    score_gradient_GXK: Tensor,
    config: MemoryConfig,
) -> Tensor:
    """dL/d query [G, X, d] from dL/d sub-score [G, X, K]."""
    pull = _pull(top, score_gradient_GXK, config)
    towards = gather_weighted_sum(keys_Gnd.flatten(0, 1), plan.index_GXK, pull.flatten(0, 1)).view_as(query_GXd)
    if config.score_type == "dot_product":
        return towards
    return towards.addcmul_(pull.sum(-1, keepdim=True), query_GXd, value=-1)


@dataclass
class KeyStepGradient:
    """What the backward pass of a sub-key step contributes.

    Attributes:
        cotangent_GXK: dL/d of the inner sub-score gradient that made the step
        sub_score_GXK: dL/d sub-score through the slope exp(score) of the step
        query_GXd, keys_Gnd: direct terms, the sub-scores held fixed
    """

    cotangent_GXK: Tensor
    sub_score_GXK: Tensor | None
    query_GXd: Tensor
    keys_Gnd: Tensor | None


def key_gradient_backward(
    query_GXd: Tensor,
    keys_Gnd: Tensor,
    top: ProductKeyTopk,
    plan: SubkeyPlan,
    score_gradient_GXK: Tensor,
    cotangent_Gnd: Tensor,
    config: MemoryConfig,
) -> KeyStepGradient:
    """Differentiates `key_gradient` with respect to all it depends on; `cotangent_Gnd` is dL/d of its result."""
    flat_query, flat_cotangent = query_GXd.flatten(0, 1), cotangent_Gnd.flatten(0, 1)
    along = gather_dot(flat_cotangent, plan.index_GXK, flat_query).view_as(score_gradient_GXK)
    pull = _pull(top, score_gradient_GXK, config)
    of_query = gather_weighted_sum(flat_cotangent, plan.index_GXK, pull.flatten(0, 1)).view_as(query_GXd)
    if config.score_type == "dot_product":
        return KeyStepGradient(along, None, of_query, None)
    key_part = (cotangent_Gnd * keys_Gnd).sum(-1).flatten()
    along = along - key_part[plan.index_GXK].view_as(along)
    total = _segment_sum(plan, pull).to(pull.dtype).view(*keys_Gnd.shape[:2], 1)
    return KeyStepGradient(
        cotangent_GXK=_slope_of_score(top) * along,
        sub_score_GXK=pull * along,
        query_GXd=of_query,
        keys_Gnd=-total * cotangent_Gnd,
    )
