"""Bytes that operations on value rows move, counted by a dispatch mode from the operations that really ran."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations that touch only the addressed rows of an operand: name -> (operand position, index position).
_ROW_INDEXED = {
    "index_select": (0, 2),
    "index_copy_": (0, 2),
    "index_add_": (0, 2),
    "embedding": (0, 1),
    "_embedding_bag": (0, 1),
    "_embedding_bag_forward_only": (0, 1),
}


class RowTraffic(TorchDispatchMode):
    """Counts bytes of all operands and results of operations on matrices of rows of `width` columns.

    An operation that addresses rows of a table counts the addressed rows, once for each time they are addressed (and
    twice when it reads and writes them); everything else counts whole tensors. Views count nothing. So a dense pass
    over a table costs its whole size, a sparse one the rows that it names.

    Attributes:
        bytes_moved: total
        by_operation: the same by operation
        largest_result: elements of the largest dense result, to show that nothing of the table's size was made
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.bytes_moved = 0
        self.largest_result = 0
        self.by_operation: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view:
            return result
        name = func.overloadpacket.__name__
        operands = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)]
        results = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        new = [t for t in results if all(t is not operand for operand in operands)]
        dense = [t.numel() for t in new if t.layout == torch.strided]  # of a sparse tensor numel() is the shape's
        self.largest_result = max([self.largest_result, *dense])
        if not any(t.dim() == 2 and t.shape[-1] == self.width for t in operands + results):
            return result
        moved = sum(_bytes(t) for t in operands) + sum(_bytes(t) for t in new)
        if name in _ROW_INDEXED:
            table, index = (args[i] for i in _ROW_INDEXED[name])
            passes = 2 if name == "index_add_" else 1
            moved += passes * index.numel() * table.shape[-1] * table.element_size() - _bytes(table)
        elif name == "sampled_addmm":
            pattern, source, transposed = args[:3]
            pairs = pattern.values().numel()
            # The pattern and the result hold an index and a value for each pair; a row of the table for each pair.
            moved = pairs * (transposed.shape[0] * source.element_size() + 2 * (8 + source.element_size()))
            moved += _bytes(source)
        self.bytes_moved += moved
        self.by_operation[name] += moved
        return result


def _bytes(tensor: Tensor) -> int:
    if tensor.layout != torch.strided:
        return 0
    return tensor.numel() * tensor.element_size()
