"""One dispatch for the sparse operations: every caller goes through the functions of this file.

An implementation is registered under a backend name ("torch" today; "triton" has its place here) for an operation.
The backend is chosen per call from the device of the operands, unless `use_backend` or the environment variable
`FWPKM_KERNELS` names one.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from fwpkm_kernels import torch_ops
from fwpkm_kernels.plan import Segments
from fwpkm_kernels.topk import ProductKeyTopk, torch_product_key_topk

_IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {
    "gather_weighted_sum": {"torch": torch_ops.gather_weighted_sum},
    "scatter_weighted_add": {"torch": torch_ops.scatter_weighted_add},
    "gather_dot": {"torch": torch_ops.gather_dot},
    "product_key_topk": {"torch": torch_product_key_topk},
}
# The order in which a device's backends are tried; "torch" has every operation on every device.
_PREFERENCE = {"cuda": ("triton", "torch")}

_forced: ContextVar[str | None] = ContextVar("fwpkm_kernels_backend", default=None)


def register(operation: str, backend: str, function: Callable[..., Any]) -> None:
    """Add or replace one implementation. Raises KeyError for an operation that does not exist."""
    if operation not in _IMPLEMENTATIONS:
        raise KeyError(f"unknown kernel operation {operation!r}; there are {', '.join(sorted(_IMPLEMENTATIONS))}")
    _IMPLEMENTATIONS[operation][backend] = function


def available_backends(operation: str) -> tuple[str, ...]:
    """Names of the registered implementations of an operation."""
    return tuple(_IMPLEMENTATIONS[operation])


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Within the context every operation runs on the named backend; it is an error if one lacks the operation."""
    known = sorted({name for table in _IMPLEMENTATIONS.values() for name in table})
    if backend not in known:
        raise ValueError(f"unknown kernel backend {backend!r}; registered: {', '.join(known)}")
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)


def _select(operation: str, operand: Tensor) -> Callable[..., Any]:
    table = _IMPLEMENTATIONS[operation]
    forced = _forced.get() or os.environ.get("FWPKM_KERNELS")
    if forced is not None:
        if forced not in table:
            raise ValueError(f"kernel backend {forced!r} has no {operation}; it exists for: {', '.join(table)}")
        return table[forced]
    for backend in _PREFERENCE.get(operand.device.type, ("torch",)):
        if backend in table:
            return table[backend]
    return table["torch"]


def gather_weighted_sum(
    rows_UD: Tensor, index_XP: Tensor, weight_XP: Tensor, offsets_X: Tensor | None = None
) -> Tensor:
    """out[x] = sum_p weight[x, p] * rows[index[x, p]].

    Shapes: rows [U, D], index [X, P] int64, weight [X, P] of the rows' dtype; or index and weight [E] of a ragged index
    with its offsets [X + 1] (see plan.py); returns [X, D]. Deterministic.
    """
    return _select("gather_weighted_sum", rows_UD)(rows_UD, index_XP, weight_XP, offsets_X)


def scatter_weighted_add(segments: Segments, source_XD: Tensor, weight_XP: Tensor) -> Tensor:
    """out[i] = sum over all (x, p) with index[x, p] = i of weight[x, p] * source[x].

    Shapes: source [X, D], weight [X, P] or ragged [E]; `segments` is the sorted order of the index; returns [U, D].
    Deterministic: each output row is one sum in the order of the flattened index.
    """
    return _select("scatter_weighted_add", source_XD)(segments, source_XD, weight_XP)


def gather_dot(rows_UD: Tensor, index_XP: Tensor, source_XD: Tensor, offsets_X: Tensor | None = None) -> Tensor:
    """out[x, p] = <rows[index[x, p]], source[x]>.

    Shapes: rows [U, D], index [X, P] int64 (or ragged [E] with its offsets [X + 1]), source [X, D]; returns the index's
    shape. Deterministic.
    """
    return _select("gather_dot", rows_UD)(rows_UD, index_XP, source_XD, offsets_X)


def product_key_topk(query_GXd: Tensor, keys_Gnd: Tensor, topk: int, score_type: str) -> ProductKeyTopk:
    """The `topk` best slots of each query among all pairs of sub-keys (semantics A.1-2; see `fwpkm_kernels.topk`).

    Shapes: query [G, X, d] and keys [G, n, d] with G = memories * heads * 2 (the two halves innermost).
    """
    return _select("product_key_topk", query_GXd)(query_GXd, keys_Gnd, topk, score_type)
