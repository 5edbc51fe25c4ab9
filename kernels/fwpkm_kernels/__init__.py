"""Sparse operations of product-key memories: one interface, several implementations.

The five operations that both passes of a sparse memory are made of:

- `product_key_topk`: the best slots of each query, and their scores
- `plan_slots` / `plan_segments`: which rows a batch of reads touches, in sorted order
- `gather_weighted_sum`: out[x] = sum_p weight[x, p] * rows[index[x, p]]
- `scatter_weighted_add`: out[i] = sum of weight[x, p] * source[x] over all (x, p) that address row i
- `gather_dot`: out[x, p] = <rows[index[x, p]], source[x]>

Each has an obvious reference in `fwpkm_kernels.reference` that tests hold every implementation against.
"""

from fwpkm_kernels.dispatch import (
    available_backends,
    gather_dot,
    gather_weighted_sum,
    product_key_topk,
    register,
    scatter_weighted_add,
    use_backend,
)
from fwpkm_kernels.plan import Segments, SlotPlan, plan_segments, plan_slots
from fwpkm_kernels.topk import IDW_EPSILON, ProductKeyTopk

__all__ = [
    "IDW_EPSILON",
    "ProductKeyTopk",
    "Segments",
    "SlotPlan",
    "available_backends",
    "gather_dot",
    "gather_weighted_sum",
    "plan_segments",
    "plan_slots",
    "product_key_topk",
    "register",
    "scatter_weighted_add",
    "use_backend",
]
