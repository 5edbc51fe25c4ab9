"""A fast state that is spread over ranks, as one rank with the whole would see it: for inference.

Token by token there is nothing to divide among ranks: all compute the same, on rows that their owners hand out.

Letters: U slots, D value width.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fwpkm.memory.config import MemoryConfig
from megatron_fwpkm.memory.fast_state import FastState
from megatron_fwpkm.memory.routing import own_columns
from megatron_fwpkm.memory.sharding import Owners


class WholeState:
    """What overlays need of a fast state. All ranks of the group call its methods together, with the same slots.

    Args:
        state: this rank's part: the slots that it owns, or its columns of all
        group: the ranks that the memory is spread over
    """

    def __init__(self, state: FastState, group: dist.ProcessGroup) -> None:
        self._state, self._group, self._rank = state, group, dist.get_rank(group)
        self.config: MemoryConfig = state.config
        self.num_slots, self.v_dim = state.config.num_slots, state.config.v_dim
        self._ranks = dist.get_world_size(group)
        self._owners = Owners(state.config.n_subkeys, self._ranks)

    @property
    def keys_H2nd(self) -> Tensor:
        """Sub-keys, the same on all ranks."""
        return self._state.keys_H2nd

    @property
    def scale(self) -> float:
        """Running scale, the same on all ranks."""
        return self._state.scale

    @property
    def generation(self) -> int:
        """Changes with every change of this rank's part; all parts change together."""
        return self._state.generation

    @property
    def dtype(self) -> torch.dtype:
        """float32, or float64 in tests."""
        return self._state.dtype

    @property
    def device(self) -> torch.device:
        """Where this rank's part is."""
        return self._state.device

    def stored_rows(self, slots_U: Tensor) -> Tensor:
        """[U, D] of the table, without the scale: each owner's rows, and zeros of the others added to them."""
        if self._state.owned is None:
            return self.all_columns(self._state.stored_rows(slots_U))
        here, row_U = self._own(slots_U)
        rows_UD = torch.zeros(slots_U.numel(), self.v_dim, dtype=self.dtype, device=self.device)
        rows_UD[here] = self._state.stored_rows(row_U)
        dist.all_reduce(rows_UD, group=self._group)
        return rows_UD

    def replace_rows(self, slots_U: Tensor, rows_UD: Tensor, decay: float = 1.0) -> None:
        """Each owner sets its rows among these, or each rank its columns, to the true values; all others decay."""
        if self._state.owned is None:
            self._state.replace_rows(slots_U, self.own_columns(rows_UD), decay)
            return
        here, row_U = self._own(slots_U)
        self._state.replace_rows(row_U, rows_UD[here], decay)

    def all_columns(self, part: Tensor) -> Tensor:
        """[..., D] of every rank's columns [..., D / R]."""
        parts = part.new_empty(self._ranks * part.numel())
        dist.all_gather_into_tensor(parts, part.reshape(-1), group=self._group)
        return torch.cat(parts.view(self._ranks, *part.shape).unbind(), -1)

    def own_columns(self, whole: Tensor) -> Tensor:
        """The inverse of `all_columns`."""
        return whole[..., own_columns(self.config.v_dim, self._rank, self._ranks)]

    def write_keys(self, keys_MH2nd: Tensor) -> None:
        """Replace the sub-keys."""
        self._state.write_keys(keys_MH2nd)

    def _own(self, slots_U: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the slots this rank owns, and their rows in its table."""
        owner_U, row_U = self._owners.locate(slots_U)
        here = (owner_U == self._rank).nonzero().view(-1)
        return here, row_U[here]
