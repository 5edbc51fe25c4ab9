"""Product-key top-k: the K best slots of a query among n*n pairs of sub-keys, without scoring n*n pairs.

Scores (semantics A.1): `idw` is -log(eps + squared distance), `dot_product` the plain product. A slot's score is the
sum of its two sub-keys' scores. Ties go to the lowest index: among sub-keys to the lowest sub-key, among pairs to the
lowest position (rank in the first half, then rank in the second).

How the ties stay exact: matrix products round identical sub-keys differently, depending on where they stand in the
table and on how many queries share the call. So scores from the matrix product choose the slots only where the
choice is clear. Queries whose deciding gaps are within the rounding error are scored again by explicit differences,
which are the same for equal sub-keys and for any batch, and sorted stably. Those are few unless sub-keys are equal.

Letters: G = memories * heads * 2 (halves innermost), X queries of one memory, n sub-keys, d width of a half, K top-k.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

IDW_EPSILON = 1e-3
# Gaps below this many units of rounding (of the largest magnitudes that enter a score) count as undecided.
_ROUNDING_UNITS = 4.0
# A squared distance this many times smaller than |q|^2 + |k|^2 is computed from explicit differences.
_NEAR_RATIO = 2.0
# Bound on the explicit differences made at once while settling undecided queries, in elements.
_SETTLE_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class ProductKeyTopk:
    """Result of a product-key top-k. `G2` is G / 2: one row of slots per memory and head.

    Attributes:
        sub_index: [G, X, K] int64, the best sub-keys of each half, best first
        sub_score: [G, X, K], their scores (no temperature)
        rank: [2, G2, X, K] int64, for each chosen slot its rank among the best sub-keys of half 1 and of half 2
        slot: [G2, X, K] int64, sub-key of half 1 * n + sub-key of half 2, best first
        score: [G2, X, K] float64, the sums: a softmax would turn rounding of float32 logarithms into relative error
    """

    sub_index: Tensor
    sub_score: Tensor
    rank: Tensor
    slot: Tensor
    score: Tensor


@functools.lru_cache(maxsize=64)
def _candidate_ranks(topk: int, available: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pairs of ranks that can be among the `topk` best sums when both lists are sorted, in position order.

    A pair (i, j) has (i + 1)(j + 1) - 1 pairs before it in both order and score, so those with (i + 1)(j + 1) > topk
    cannot be chosen: 20 of 64 remain for topk 8.
    """
    pairs = [(i, j) for i in range(available) for j in range(available) if (i + 1) * (j + 1) <= topk]
    table = torch.tensor(pairs, dtype=torch.int64, device=device).reshape(-1, 2)
    return table[:, 0].contiguous(), table[:, 1].contiguous()


def _best_sums(sub_score_GXk: Tensor, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `wanted` best sums of the two halves' sorted scores: (values, rank in half 1, rank in half 2)."""
    halves = sub_score_GXk.unflatten(0, (-1, 2))
    rank_1, rank_2 = _candidate_ranks(wanted, sub_score_GXk.shape[-1], sub_score_GXk.device)
    sums = halves[:, 0][..., rank_1] + halves[:, 1][..., rank_2]
    values, position = torch.sort(sums, dim=-1, descending=True, stable=True)
    position = position[..., :wanted]
    return values[..., :wanted], rank_1[position], rank_2[position]


@dataclass(frozen=True)
class _Ranking:
    """Ranking values from one batched product, and what is needed to judge their rounding.

    For idw the value is <q, k> - |k|^2 / 2, which ranks as the score does: the logarithm is taken of the chosen only.
    The queries' squares are float64: a distance has only the rounding of the value.
    """

    value_GXn: Tensor
    query_square_GX1: Tensor
    key_square_Gn: Tensor
    score_type: str

    def errors(self, key_square: Tensor, query_square: Tensor) -> Tensor:
        """Bounds on the rounding errors of values, from |k|^2 and |q|^2 (broadcast)."""
        unit = _ROUNDING_UNITS * torch.finfo(self.value_GXn.dtype).eps
        product = (query_square * key_square).sqrt()
        return unit * (product if self.score_type == "dot_product" else product + key_square)


def _rank(query_GXd: Tensor, keys_Gnd: Tensor, score_type: str) -> _Ranking:
    query_square = torch.linalg.vector_norm(query_GXd, dim=-1, keepdim=True, dtype=torch.float64).square()
    key_square = keys_Gnd.square().sum(-1)
    if score_type == "dot_product":
        value = torch.bmm(query_GXd, keys_Gnd.transpose(1, 2))
    else:
        value = torch.baddbmm(key_square.mul(-0.5).unsqueeze(1), query_GXd, keys_Gnd.transpose(1, 2))
    return _Ranking(value, query_square, key_square, score_type)


def _scores_from_values(value: Tensor, query_square: Tensor, score_type: str) -> Tensor:
    if score_type == "dot_product":
        return value.double()
    return -torch.log((query_square - 2 * value.double()).clamp_min(0).add(IDW_EPSILON))


def _explicit_scores(query: Tensor, keys: Tensor, score_type: str) -> Tensor:
    """Scores [...] of query [..., d] and keys [..., d] without cancellation: equal for equal sub-keys."""
    if score_type == "dot_product":
        return (query * keys).sum(-1).double()
    return -torch.log((query - keys).square().sum(-1).double() + IDW_EPSILON)


def _refine_near(query_GXd: Tensor, keys_Gnd: Tensor, sub_index: Tensor, score: Tensor, magnitude: Tensor) -> Tensor:
    """Scores of chosen sub-keys again by explicit differences, for queries that lie close to a sub-key.

    There |q|^2 + |k|^2 - 2 <q, k> cancels: its relative error is `magnitude` / squared distance units of rounding.
    """
    near = (magnitude > _NEAR_RATIO * torch.exp(-score)).any(-1)
    if not bool(near.any()):
        return score
    group, query = near.nonzero(as_tuple=True)
    block = max(1, _SETTLE_ELEMENTS // (score.shape[-1] * query_GXd.shape[-1]))
    for start in range(0, group.numel(), block):
        g, x = group[start : start + block], query[start : start + block]
        keys = keys_Gnd[g.unsqueeze(1), sub_index[g, x]]
        score[g, x] = _explicit_scores(query_GXd[g, x].unsqueeze(1), keys, "idw")
    return score


def _undecided(value: Tensor, score: Tensor, sums: Tensor, error: Tensor, ranking: _Ranking) -> Tensor:
    """[G2, X] bool: queries one of whose deciding gaps is within the rounding error of the matrix product.

    `error` [G, X, K + 1] bounds the errors of the values of the chosen sub-keys.
    """

    def narrow(sorted_values: Tensor, bound: Tensor) -> Tensor:
        # "not wider" instead of "narrower": an infinite or undefined gap is undecided too.
        return ~((sorted_values[..., :-1] - sorted_values[..., 1:]) > bound).all(-1)

    sub_narrow = narrow(value, torch.maximum(error[..., :-1], error[..., 1:]))
    score_error = error.amax(-1, keepdim=True)
    if ranking.score_type == "idw":
        # d score / d value = 2 exp(score), largest for the best sub-key. The error of |q|^2 is common to all
        # sub-keys: only differences of the slope let it through.
        slope = torch.exp(score[..., :1])
        spread = slope - torch.exp(score[..., -1:])
        unit = _ROUNDING_UNITS * torch.finfo(value.dtype).eps
        score_error = 2 * score_error * slope + unit * ranking.query_square_GX1 * spread
    by_half = score_error.unflatten(0, (-1, 2)).sum(1)
    rounding = _ROUNDING_UNITS * torch.finfo(sums.dtype).eps * sums[..., :1].abs()
    return sub_narrow.unflatten(0, (-1, 2)).any(1) | narrow(sums, by_half + rounding)


def _settle(
    query_GXd: Tensor, keys_Gnd: Tensor, ranking: _Ranking, undecided_2X: Tensor, topk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores undecided queries by explicit differences. Returns (group, query, sub_index [F, 2, K], sub_score).

    Only sub-keys that could be among the best within the rounding error are scored: a few, or all n where many tie.
    """
    group, query = undecided_2X.nonzero(as_tuple=True)
    n, count = keys_Gnd.shape[1], min(keys_Gnd.shape[1], 4 * topk)
    sub_index = torch.empty(group.numel(), 2, topk, dtype=torch.int64, device=group.device)
    sub_score = torch.empty(group.numel(), 2, topk, dtype=torch.float64, device=group.device)
    halves = ranking.value_GXn.unflatten(0, (-1, 2))
    squares = ranking.query_square_GX1.unflatten(0, (-1, 2)), ranking.key_square_Gn.unflatten(0, (-1, 2))
    block = max(1, _SETTLE_ELEMENTS // (2 * max(n, count * query_GXd.shape[-1])))
    for start in range(0, group.numel(), block):
        part = torch.arange(start, min(start + block, group.numel()), device=group.device)
        g, x = group[part], query[part]
        value_F2n = halves[g, :, x]
        error_F2n = ranking.errors(squares[1][g], squares[0][g, :, x])
        best, candidates = torch.topk(value_F2n + error_F2n, count, dim=-1)
        surely = torch.topk(value_F2n - error_F2n, topk, dim=-1).values[..., -1]
        clear = (best[..., -1] < surely).all(-1) if count < n else torch.ones_like(part, dtype=torch.bool)
        everything = torch.arange(n, device=g.device).expand_as(value_F2n)
        for chosen, numbers in ((clear, candidates), (~clear, everything)):
            at_once = max(1, _SETTLE_ELEMENTS // (2 * numbers.shape[-1] * query_GXd.shape[-1]))
            for piece in chosen.nonzero().view(-1).split(at_once):
                index, score = _score_candidates(
                    query_GXd, keys_Gnd, g[piece], x[piece], numbers[piece], ranking.score_type
                )
                sub_index[part[piece]], sub_score[part[piece]] = index[..., :topk], score[..., :topk]
    return group, query, sub_index, sub_score


def _score_candidates(
    query_GXd: Tensor, keys_Gnd: Tensor, group: Tensor, query: Tensor, candidates_F2c: Tensor, score_type: str
) -> tuple[Tensor, Tensor]:
    """Candidate sub-keys of some queries, best first, and their explicit scores, each [F, 2, c]."""
    query_by_head, keys_by_head = query_GXd.unflatten(0, (-1, 2)), keys_Gnd.unflatten(0, (-1, 2))
    half = torch.arange(2, device=group.device).view(1, 2, 1)
    # Ascending, so that a stable sort leaves ties at the lowest index.
    candidates = candidates_F2c.sort(-1).values
    keys = keys_by_head[group.view(-1, 1, 1), half, candidates]
    exact = _explicit_scores(query_by_head[group, :, query].unsqueeze(2), keys, score_type)
    score, position = torch.sort(exact, dim=-1, descending=True, stable=True)
    return candidates.gather(-1, position), score


def torch_product_key_topk(query_GXd: Tensor, keys_Gnd: Tensor, topk: int, score_type: str) -> ProductKeyTopk:
    """See `fwpkm_kernels.product_key_topk` and the head of this file."""
    n = keys_Gnd.shape[1]
    if query_GXd.device.type == "cuda" and query_GXd.dtype == torch.float32:
        with _without_tf32():
            ranking = _rank(query_GXd, keys_Gnd, score_type)
    else:
        ranking = _rank(query_GXd, keys_Gnd, score_type)
    # One more than needed, to see whether the last choice was clear.
    value, sub_index = torch.topk(ranking.value_GXn, min(topk + 1, n), dim=-1)
    score = _scores_from_values(value, ranking.query_square_GX1, score_type)
    key_square = ranking.key_square_Gn.unsqueeze(1).expand(-1, value.shape[1], -1).gather(-1, sub_index)
    if score_type == "idw":
        score = _refine_near(query_GXd, keys_Gnd, sub_index, score, ranking.query_square_GX1 + key_square)
    error = ranking.errors(key_square, ranking.query_square_GX1)
    sums, rank_1, rank_2 = _best_sums(score, min(topk + 1, score.shape[-1] ** 2))
    undecided = _undecided(value, score, sums, error, ranking)
    sub_index, sub_score = sub_index[..., :topk].contiguous(), score[..., :topk].contiguous()
    slot_score, rank = sums[..., :topk].contiguous(), torch.stack([rank_1[..., :topk], rank_2[..., :topk]])
    if bool(undecided.any()):
        group, query, exact_index, exact_score = _settle(query_GXd, keys_Gnd, ranking, undecided, topk)
        sub_index.unflatten(0, (-1, 2))[group, :, query] = exact_index
        sub_score.unflatten(0, (-1, 2))[group, :, query] = exact_score
        best, first, second = _best_sums(exact_score.transpose(0, 1), topk)  # [F, 2, K] seen as one group of F queries
        slot_score[group, query], rank[0][group, query], rank[1][group, query] = best[0], first[0], second[0]
    halves = sub_index.unflatten(0, (-1, 2))
    slot = halves[:, 0].gather(-1, rank[0]) * n + halves[:, 1].gather(-1, rank[1])
    return ProductKeyTopk(sub_index, sub_score.to(query_GXd.dtype), rank, slot, slot_score)


class _without_tf32:
    """Full float32 products on CUDA: idw distances cancel, so TF32's 10-bit mantissa would choose wrong slots."""

    def __enter__(self) -> None:
        self._allowed = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False

    def __exit__(self, *_: object) -> None:
        torch.backends.cuda.matmul.allow_tf32 = self._allowed
