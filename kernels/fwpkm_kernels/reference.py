"""Slow, obvious versions of the sparse operations: the yardstick of every implementation."""

import torch
from torch import Tensor

from fwpkm_kernels.topk import IDW_EPSILON


def gather_weighted_sum(
    rows_UD: Tensor, index_XP: Tensor, weight_XP: Tensor, offsets_X: Tensor | None = None
) -> Tensor:
    """out[x] = sum_p weight[x, p] * rows[index[x, p]]."""
    if offsets_X is not None:
        out = rows_UD.new_zeros(offsets_X.numel() - 1, rows_UD.shape[1])
        for x in range(out.shape[0]):
            for e in range(int(offsets_X[x]), int(offsets_X[x + 1])):
                out[x] += weight_XP[e] * rows_UD[index_XP[e]]
        return out
    return (rows_UD[index_XP] * weight_XP.unsqueeze(-1)).sum(1)


def scatter_weighted_add(num_rows: int, index_XP: Tensor, source_XD: Tensor, weight_XP: Tensor) -> Tensor:
    """out[i] = sum over (x, p) with index[x, p] = i of weight[x, p] * source[x], one pair after the other."""
    out = source_XD.new_zeros(num_rows, source_XD.shape[1])
    for x in range(index_XP.shape[0]):
        for p in range(index_XP.shape[1]):
            out[index_XP[x, p]] += weight_XP[x, p] * source_XD[x]
    return out


def gather_dot(rows_UD: Tensor, index_XP: Tensor, source_XD: Tensor, offsets_X: Tensor | None = None) -> Tensor:
    """out[x, p] = <rows[index[x, p]], source[x]>."""
    if offsets_X is not None:
        out = source_XD.new_zeros(index_XP.shape)
        for x in range(offsets_X.numel() - 1):
            for e in range(int(offsets_X[x]), int(offsets_X[x + 1])):
                out[e] = rows_UD[index_XP[e]] @ source_XD[x]
        return out
    return (rows_UD[index_XP] * source_XD.unsqueeze(1)).sum(-1)


def subkey_scores(query_Xd: Tensor, keys_nd: Tensor, score_type: str) -> Tensor:
    """Scores [X, n] of every sub-key, by explicit differences or products (no cancellation, exact ties)."""
    if score_type == "dot_product":
        return (query_Xd.unsqueeze(1) * keys_nd).sum(-1)
    return -torch.log(IDW_EPSILON + (query_Xd.unsqueeze(1) - keys_nd).square().sum(-1))


def stable_topk(scores: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The largest entries along the last axis; equal ones in the order of their indices. Returns (values, indices)."""
    values, indices = torch.sort(scores, dim=-1, descending=True, stable=True)
    return values[..., :topk], indices[..., :topk]


def product_key_topk(
    query_halves: tuple[Tensor, Tensor], key_halves: tuple[Tensor, Tensor], topk: int, score_type: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Best slots of one head: query halves [X, d], key halves [n, d].

    Returns slots [X, K], their scores [X, K] (sorted), and the chosen sub-keys [2, X, K] of the halves.
    """
    n = key_halves[0].shape[0]
    (score_1, sub_1), (score_2, sub_2) = (
        stable_topk(subkey_scores(q, k, score_type), topk) for q, k in zip(query_halves, key_halves, strict=True)
    )
    sums = (score_1.unsqueeze(2) + score_2.unsqueeze(1)).flatten(1)
    scores, position = stable_topk(sums, topk)
    slots = sub_1.gather(1, position // topk) * n + sub_2.gather(1, position % topk)
    return slots, scores, torch.stack([sub_1, sub_2])
