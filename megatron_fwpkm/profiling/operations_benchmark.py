"""Candidates for each sparse operation, timed side by side: why `fwpkm_kernels.torch_ops` is written as it is."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fwpkm_kernels import gather_dot, gather_weighted_sum, plan_slots, scatter_weighted_add


def _milliseconds(function: Callable[[], object], repeats: int) -> float:
    for _ in range(2):
        function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def candidates(queries: int, pairs: int, width: int, slots: int) -> dict[str, dict[str, Callable[[], object]]]:
    """Operation -> name of the candidate -> a call of it, on random float32 operands of these sizes."""
    generator = torch.Generator().manual_seed(0)
    table_ND = torch.randn(slots, width, generator=generator)
    slot_XP = torch.randint(0, slots, (queries, pairs), generator=generator)
    weight_XP = torch.rand(queries, pairs, generator=generator)
    source_XD = torch.randn(queries, width, generator=generator)
    plan = plan_slots(slot_XP)
    rows_UD = table_ND[plan.slots_U]
    index_XP, flat = plan.inverse_XP, plan.inverse_XP.reshape(-1)
    change_UD = torch.randn(rows_UD.shape, generator=generator)

    def gathered() -> Tensor:
        return rows_UD.index_select(0, flat).view(queries, pairs, width)

    def outer() -> Tensor:
        return (weight_XP.unsqueeze(-1) * source_XD.unsqueeze(1)).view(-1, width)

    return {
        "gather-weighted-sum": {
            "embedding_bag (chosen)": lambda: gather_weighted_sum(rows_UD, index_XP, weight_XP),
            "index_select, bmm": lambda: torch.bmm(weight_XP.unsqueeze(1), gathered()),
            "index_select, mul, sum": lambda: (gathered() * weight_XP.unsqueeze(-1)).sum(1),
        },
        "scatter-add": {
            "embedding_bag over segments (chosen)": lambda: scatter_weighted_add(plan.segments, source_XD, weight_XP),
            "mul, index_add_": lambda: torch.zeros_like(rows_UD).index_add_(0, flat, outer()),
        },
        "gather-dot": {
            "sampled_addmm (chosen)": lambda: gather_dot(rows_UD, index_XP, source_XD),
            "index_select, bmm": lambda: torch.bmm(gathered(), source_XD.unsqueeze(-1)),
            "index_select, mul, sum": lambda: (gathered() * source_XD.unsqueeze(1)).sum(-1),
        },
        "read rows of the table": {
            "index_select (chosen)": lambda: table_ND.index_select(0, plan.slots_U),
            "indexing": lambda: table_ND[plan.slots_U],
            "embedding": lambda: F.embedding(plan.slots_U, table_ND),
        },
        "write rows of the table": {
            "index_add_ of the change (chosen)": lambda: table_ND.index_add_(0, plan.slots_U, change_UD),
            "index_copy_": lambda: table_ND.index_copy_(0, plan.slots_U, change_UD),
            "indexing": lambda: table_ND.__setitem__(plan.slots_U, change_UD),
        },
    }


def run_operations_benchmark(queries: int, pairs: int, width: int, slots: int, repeats: int) -> None:
    """Print a table of median milliseconds."""
    from rich.console import Console
    from rich.table import Table

    title = f"{queries} queries x {pairs} pairs x {width} columns, {slots} slots, {torch.get_num_threads()} threads"
    table = Table("operation", "candidate", "ms", box=None, title=title)
    for operation, calls in candidates(queries, pairs, width, slots).items():
        for name, call in calls.items():
            table.add_row(operation, name, f"{_milliseconds(call, repeats):.3f}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
