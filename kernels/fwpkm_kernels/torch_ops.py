"""The sparse operations in PyTorch.

Which torch operation serves which purpose is measured by `python launch/bench_memory.py --operations`: on CPU
`embedding_bag` with per-sample weights does gather-weighted-sum and, over sorted segments, scatter-add faster than
index_select + bmm or index_add, without the [X, P, D] intermediate; `sampled_addmm` does gather-dot likewise. All three
are multithreaded over output rows, so the sums are deterministic.
"""

import functools
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from fwpkm_kernels.plan import Segments


def gather_weighted_sum(
    rows_UD: Tensor, index_XP: Tensor, weight_XP: Tensor, offsets_X: Tensor | None = None
) -> Tensor:
    """See `fwpkm_kernels.gather_weighted_sum`."""
    if index_XP.numel() == 0 or rows_UD.shape[0] == 0:
        queries = index_XP.shape[0] if offsets_X is None else offsets_X.numel() - 1
        return rows_UD.new_zeros(queries, rows_UD.shape[1])
    return F.embedding_bag(
        index_XP,
        rows_UD,
        offsets_X,
        per_sample_weights=weight_XP,
        mode="sum",
        include_last_offset=offsets_X is not None,
    )


def scatter_weighted_add(segments: Segments, source_XD: Tensor, weight_XP: Tensor) -> Tensor:
    """See `fwpkm_kernels.scatter_weighted_add`."""
    num_rows = segments.offsets.numel() - 1
    if segments.order.numel() == 0 or num_rows == 0:
        return source_XD.new_zeros(num_rows, source_XD.shape[1])
    weight = weight_XP.reshape(-1)[segments.order]
    return F.embedding_bag(
        segments.queries,
        source_XD.contiguous(),
        segments.offsets,
        per_sample_weights=weight,
        mode="sum",
        include_last_offset=True,
    )


def gather_dot(rows_UD: Tensor, index_XP: Tensor, source_XD: Tensor, offsets_X: Tensor | None = None) -> Tensor:
    """See `fwpkm_kernels.gather_dot`."""
    queries, number = source_XD.shape[0], index_XP.numel()
    if number == 0:
        return source_XD.new_zeros(index_XP.shape)
    if rows_UD.device.type != "cpu" or number > queries * rows_UD.shape[0]:
        gathered_ED = rows_UD.index_select(0, index_XP.reshape(-1))
        if offsets_X is None:
            return torch.bmm(gathered_ED.view(queries, -1, gathered_ED.shape[1]), source_XD.unsqueeze(-1)).squeeze(-1)
        return (gathered_ED * source_XD.repeat_interleave(offsets_X.diff(), 0, output_size=number)).sum(1)
    _quiet_sparse_warnings()
    row_starts = torch.arange(0, number + 1, number // queries) if offsets_X is None else offsets_X
    pattern = torch.sparse_csr_tensor(
        row_starts,
        index_XP.reshape(-1),
        source_XD.new_zeros(number),
        size=(queries, rows_UD.shape[0]),
        check_invariants=False,  # a query may address one row from several heads: unsorted, repeated columns
    )
    products = torch.sparse.sampled_addmm(pattern, source_XD.contiguous(), rows_UD.contiguous().t(), beta=0.0)
    return products.values().view(index_XP.shape)


@functools.cache
def _quiet_sparse_warnings() -> None:
    """Torch announces once per process that its CSR tensors are in beta; take that announcement here, unseen."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(
            torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), size=(1, 1), check_invariants=False
        )
