"""The values of a PKM layer: a trained table that is no parameter, whole or spread over the ranks of a group.

Parameters belong to DeepSpeed: its optimizer would keep dense gradients and moments of all N rows, and ZeRO-3 would
gather all of them for every forward pass. The table is a plain leaf tensor instead, to which autograd gives sparse
gradients; `train/tables.py` updates it, and saves it.

Letters: N rows of this rank, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_fwpkm.memory.config import MemoryConfig, MemoryConfigError
from megatron_fwpkm.memory.fast_state import draw_part
from megatron_fwpkm.memory.routing import count_owned_slots, owned_slots


class SlowTable:
    """Owner of the values of one layer, of which this is rank `rank` of `ranks`.

    Attributes:
        values_ND: all slots in order, or those of this rank in the order of `routing.owned_slots`

    Raises MemoryConfigError when there are more ranks than sub-keys.
    """

    def __init__(self, config: MemoryConfig, rank: int = 0, ranks: int = 1) -> None:
        if not 0 <= rank < ranks <= config.n_subkeys:
            raise MemoryConfigError(
                f"rank {rank} of {ranks}: the slots of n_subkeys={config.n_subkeys} go to 1 to that many ranks; use "
                f"fewer tensor-parallel ranks, or n_subkeys of at least {ranks}"
            )
        self.config, self.rank, self.ranks = config, rank, ranks
        n = config.n_subkeys
        self.values_ND = torch.empty(n * -(-n // ranks), config.v_dim, requires_grad=True)

    @property
    def num_slots(self) -> int:
        """Slots of this rank; where R does not divide the sub-keys some rows of the table are nobody's."""
        return count_owned_slots(self.config.n_subkeys, self.rank, self.ranks)

    @torch.no_grad()
    def draw(self) -> None:
        """Normal values of deviation 1 / sqrt(v_dim) from torch's default generator.

        On every rank the generator moves as for the whole table, and the values are those that the slots have there.
        """
        if self.ranks == 1:
            self.values_ND.normal_(0, 1 / math.sqrt(self.config.v_dim))
        elif not self.values_ND.is_meta:
            draw_part(
                self.values_ND, owned_slots(self.config.n_subkeys, self.rank, self.ranks), slice(None), self.config
            )

    @torch.no_grad()
    def place(self, whole_SD: Tensor) -> None:
        """Take this rank's rows of a whole table [n², D]. Raises ValueError when it has another shape."""
        wanted = (self.config.num_slots, self.config.v_dim)
        if whole_SD.shape != wanted:
            raise ValueError(f"the whole table has shape {tuple(whole_SD.shape)}, not {wanted}")
        if self.ranks == 1:
            self.values_ND.copy_(whole_SD)
            return
        owned_N = owned_slots(self.config.n_subkeys, self.rank, self.ranks).to(whole_SD.device)
        rows_ND = whole_SD.index_select(0, owned_N.clamp(min=0)).masked_fill_((owned_N < 0).unsqueeze(1), 0)
        self.values_ND.copy_(rows_ND)

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change device or dtype in place, as `nn.Module` does with parameters: whoever holds the tensor keeps it."""
        values, gradient = self.values_ND, self.values_ND.grad
        with torch.no_grad():
            changed = change(values)
        if torch._has_compatible_shallow_copy_type(values, changed):
            values.grad = None  # of the old dtype
            values.data = changed
            values.grad = None if gradient is None else change(gradient)
        else:
            self.values_ND = changed.detach().requires_grad_(values.requires_grad)
