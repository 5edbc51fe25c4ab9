"""Fast state: the object that owns a memory layer's fast weights, and everything that may happen to them.

Fast weights are neither parameters nor buffers: `.to(torch.bfloat16)`, optimizers, ZeRO, weight decay and gradient
clipping never see them. They change only through writes, and every write can be taken back at the cost of the rows
that it touched.

Weight decay acts on all N rows of every write. It is applied lazily: true values are `scale * table`, with one
running scale. Files hold (table, scale) as they are, so that a resumed run is bitwise the same. The scale is folded
into the table below a threshold: the one O(N) event, counted in `num_folds`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_fwpkm.memory.config import MemoryConfig, Reset
from megatron_fwpkm.memory.overlay import Overlay, usable_in_training
from megatron_fwpkm.memory.placement import Sharding
from megatron_fwpkm.memory.routing import own_columns, owned_slots
from megatron_fwpkm.memory.undo import UndoLog

_FOLD_BELOW = 2.0**-20


class MemoryView(Protocol):
    """What a call reads and writes: the base itself or an overlay of `memories` memories over it."""

    memories: int
    num_slots: int
    """Rows of one memory in this rank's table."""
    tables: int
    """Replicas whose memories have rows here, each `memories` of them; sub-keys are those of this rank's own."""

    @property
    def keys_MH2nd(self) -> Tensor:
        """Sub-keys of each memory; never written in place."""
        ...

    def call(self) -> AbstractContextManager[None]:
        """One call of the memory: what happens when it fails half-way is up to the view."""
        ...

    def read_rows(self, slots_U: Tensor) -> Tensor:
        """True values [U, D] of distinct slots, as a tensor that nothing changes afterwards."""
        ...

    def write_rows(self, slots_U: Tensor, before_UD: Tensor, change_UD: Tensor, decay: float) -> None:
        """Set rows to decay * before + change, and decay all others."""
        ...

    def write_keys(self, keys_MH2nd: Tensor) -> None:
        """Replace the sub-keys."""
        ...


@dataclass(frozen=True)
class Snapshot:
    """A whole copy of a fast state, made by `FastState.snapshot`."""

    keys_H2nd: Tensor
    table_ND: Tensor
    scale: float


def draw_part(
    table: Tensor,
    owned_N: Tensor | None,
    columns: slice,
    config: MemoryConfig,
    generator: torch.Generator | None = None,
) -> None:
    """Fill a rank's rows or columns with those of a whole table, drawn line by line: the whole may not fit here.

    A line are the slots of one first sub-key; `owned_N` None stands for all slots, others are those of
    `routing.owned_slots`, which has equally many places for each line.
    """
    n, width = config.n_subkeys, config.v_dim
    # The generator makes 16 normal numbers at a time: longer lines of other lengths would come out differently.
    lines = 1 if n * width % 16 == 0 else n
    deviation = 1 / math.sqrt(config.v_dim)
    table.zero_()
    for first in range(0, n, lines):
        drawn = torch.empty(lines * n, width, dtype=table.dtype).normal_(0, deviation, generator=generator)
        drawn = drawn[:, columns]
        if owned_N is None:
            table[first * n : (first + lines) * n] = drawn
            continue
        places = slice(first * len(owned_N) // n, (first + lines) * len(owned_N) // n)
        there = owned_N[places] >= 0
        table[places][there] = drawn[owned_N[places][there] - first * n]


class FastState:
    """Owner of K1, K2 (`keys_H2nd`) and V (`table_ND`) of one layer.

    Shapes: keys [H, 2, n, k_dim / 2], table [N, D]; dtype float32 (float64 in tests). Initial values as the paper's
    code: keys uniform in +-1 / sqrt(k_dim), values normal with standard deviation 1 / sqrt(v_dim), from `seed` alone,
    so all replicas start equal.
    """

    def __init__(
        self,
        config: MemoryConfig,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        rank: int = 0,
        ranks: int = 1,
        sharding: Sharding = "slots",
    ) -> None:
        """Under `torch.device("meta")` the state has shapes only.

        With several `ranks` the table has the slots of this one alone (`routing.owned_slots`), or with `sharding`
        "columns" all slots in this one's columns, with the values that they have in a whole table of the same seed;
        sub-keys are whole.

        Raises:
            ValueError: another dtype, more ranks than sub-keys, or columns that don't divide among the ranks.
        """
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"the fast state is float32 (or float64 in tests), not {dtype}")
        self.config = config
        by_slots = ranks > 1 and sharding == "slots"
        if not 0 <= rank < ranks or (by_slots and ranks > config.n_subkeys):
            raise ValueError(f"rank {rank} of {ranks}: slots of {config.n_subkeys} sub-keys go to 1 to that many ranks")
        self.owned = owned_slots(config.n_subkeys, rank, ranks) if by_slots else None
        """Slots of the rows, -1 for a row that is none's; None for all in order."""
        by_columns = sharding == "columns"
        self.columns = own_columns(config.v_dim, rank, ranks) if by_columns else slice(0, config.v_dim)
        """Columns of the values that are here."""
        self.num_slots = config.num_slots if self.owned is None else self.owned.numel()
        self.v_dim = self.columns.stop - self.columns.start
        self.memories = self.tables = 1
        self.version = 0  # number of writes, kept in files
        self.generation = 0  # changes with every change, never goes back: how overlays notice
        self.scale = 1.0
        self.num_folds = 0
        generator = torch.Generator().manual_seed(seed)
        keys = torch.empty(config.heads, 2, config.n_subkeys, config.k_dim // 2, dtype=dtype)
        table = torch.empty(self.num_slots, self.v_dim, dtype=dtype)
        if not keys.is_meta:
            keys.uniform_(-1 / math.sqrt(config.k_dim), 1 / math.sqrt(config.k_dim), generator=generator)
            if ranks == 1:
                table.normal_(0, 1 / math.sqrt(config.v_dim), generator=generator)
            else:
                draw_part(table, self.owned, self.columns, config, generator)
            keys, table = keys.to(device), table.to(device)
        self.keys_H2nd, self.table_ND = keys, table
        self._log: UndoLog | None = None
        self._step_overlay: Overlay | None = None
        self._evaluation_overlay: Overlay | None = None

    @property
    def dtype(self) -> torch.dtype:
        """float32, or float64 in tests."""
        return self.table_ND.dtype

    @property
    def device(self) -> torch.device:
        """Where the fast weights are."""
        return self.table_ND.device

    @property
    def num_bytes(self) -> int:
        """Bytes of the fast weights."""
        return sum(t.numel() * t.element_size() for t in (self.keys_H2nd, self.table_ND))

    def to(self, device: torch.device | str) -> FastState:
        """Move to a device. The dtype never changes."""
        if torch.device(device) != self.device:
            if self._log is not None or self._evaluation_overlay is not None:
                raise RuntimeError("the fast state can't move to another device in the middle of a step or evaluation")
            self.keys_H2nd, self.table_ND = self.keys_H2nd.to(device), self.table_ND.to(device)
            self._step_overlay = None
        return self

    # -- what calls read and write -------------------------------------------------------------------------------

    @property
    def keys_MH2nd(self) -> Tensor:
        """The sub-keys as those of one memory."""
        return self.keys_H2nd.unsqueeze(0)

    def view(self, batch: int, *, training: bool, reset: Reset | None = None, replicas: int = 1) -> MemoryView:
        """The memory that one call reads and writes, by the reset policy (None: that of the configuration).

        In training: the base (`carry`), this step's overlay (`per_step`) or one throw-away memory for each sequence
        (`per_sequence`; `per_document`, where a call's sequences are documents). Otherwise the overlay of the running
        `evaluation()`, or a throw-away one; with `per_step` always a throw-away one, as if each call were a step.

        Where the table has rows of several `replicas`' memories, there is one for each sequence of each replica, or one
        for all: `MemoryGroup.tables` or `MemoryGroup.batches` must be their number.
        """
        reset = reset or self.config.reset
        if reset in ("per_sequence", "per_document"):
            return Overlay(self, batch, replicas)
        if not training:
            carried = self._evaluation_overlay if reset == "carry" else None
            return carried or Overlay(self, 1)
        if reset == "per_step":
            if self._step_overlay is None:
                self._step_overlay = Overlay(self, 1)
            return self._step_overlay
        return self

    def stored_rows(self, slots_U: Tensor) -> Tensor:
        """[U, D] of the table, without the scale, as a new tensor. A slot may be asked for more than once."""
        return self.table_ND.index_select(0, slots_U)

    def read_rows(self, slots_U: Tensor) -> Tensor:
        """True values [U, D] of distinct slots, as a new tensor."""
        rows = self.stored_rows(slots_U)
        return rows if self.scale == 1.0 else rows.mul_(self.scale)

    def write_rows(self, slots_U: Tensor, before_UD: Tensor, change_UD: Tensor, decay: float) -> None:
        """Set rows to decay * before + change, and decay all others by moving the scale."""
        if self._log is not None:
            stored = before_UD if self.scale == 1.0 else self.table_ND.index_select(0, slots_U)
            self._log.record(slots_U, stored)
        self._touch()
        if decay == 1.0 and self.scale == 1.0:
            self.table_ND.index_add_(0, slots_U, change_UD)
            return
        self._decay_all(decay)
        rows = torch.add(change_UD, before_UD, alpha=decay)
        self.table_ND.index_copy_(0, slots_U, rows.div_(self.scale))

    def replace_rows(self, slots_U: Tensor, rows_UD: Tensor, decay: float = 1.0) -> None:
        """Set rows to the given true values, and decay all others."""
        if self._log is not None:
            self._log.record(slots_U, self.table_ND.index_select(0, slots_U))
        self._touch()
        self._decay_all(decay)
        self.table_ND.index_copy_(0, slots_U, rows_UD / self.scale)

    def write_keys(self, keys_MH2nd: Tensor) -> None:
        """Replace the sub-keys; the old tensor stays valid for whoever saved it."""
        self.keys_H2nd = usable_in_training(keys_MH2nd.squeeze(0))
        self._touch()

    def _touch(self) -> None:
        self.version += 1
        self.generation += 1

    def _decay_all(self, decay: float) -> None:
        self.scale *= decay
        if self.scale >= _FOLD_BELOW:
            return
        if self._log is not None:
            self._log.record_table(self.table_ND)
        self.table_ND.mul_(self.scale)
        self.scale = 1.0
        self.num_folds += 1

    @contextmanager
    def call(self) -> Iterator[None]:
        """Within the context an exception takes back, bitwise, what was written since its start."""
        owned = self._log is None
        log = self._log = self._log or UndoLog(self.keys_H2nd, self.scale)
        keys, scale, mark = self.keys_H2nd, self.scale, log.begin_call()
        try:
            yield
        except BaseException:
            log.undo(self.table_ND, keep_entries=mark)
            self.keys_H2nd, self.scale = keys, scale
            self._touch()
            raise
        finally:
            if owned:
                self._log = None

    # -- steps ----------------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Start an optimizer step: from here until `commit_step` everything can be rolled back.

        Raises:
            RuntimeError: the last step was neither committed nor rolled back.
        """
        if self._log is not None:
            raise RuntimeError("begin_step was called twice: commit_step or rollback_step must come between")
        self._log = UndoLog(self.keys_H2nd, self.scale)
        self._step_overlay = None

    def commit_step(self) -> None:
        """Keep what the step wrote. Raises RuntimeError without a `begin_step`."""
        if self._log is None:
            raise RuntimeError("commit_step needs a begin_step before it")
        self._log = self._step_overlay = None

    def rollback_step(self) -> None:
        """Take back everything written since `begin_step`, bitwise, at the cost of the touched rows."""
        if self._log is None:
            raise RuntimeError("rollback_step needs a begin_step before it")
        self._restore(self._log)
        self._log = self._step_overlay = None

    def begin_microbatch(self) -> None:
        """Bound the undo log: earlier calls of the step keep only the first touch of each row."""
        if self._log is not None:
            self._log.compact()

    def _restore(self, log: UndoLog) -> None:
        log.undo(self.table_ND)
        self.keys_H2nd, self.scale = log.keys, log.scale
        self._touch()

    @contextmanager
    def evaluation(self, *, keep: bool = False) -> Iterator[None]:
        """Within the context evaluation calls share one memory, which starts as the state is now and then is dropped.

        With `keep` what they wrote becomes the state at the end (the paper's code does that).

        Raises:
            ValueError: `keep` where the reset policy keeps nothing.
            RuntimeError: an evaluation is active already.
        """
        if keep and self.config.reset != "carry":
            raise ValueError(f"evaluation(keep=True) has nothing to keep with reset = {self.config.reset!r}")
        if self._evaluation_overlay is not None:
            raise RuntimeError("evaluation() is already active on this fast state")
        overlay = self._evaluation_overlay = Overlay(self, 1)
        try:
            yield
            if keep:
                overlay.commit()
        finally:
            self._evaluation_overlay = None

    # -- whole copies and files -----------------------------------------------------------------------------------

    def values_ND(self) -> Tensor:
        """Dense copy [N, D] of the true values. O(N)."""
        return self.table_ND * self.scale

    def snapshot(self) -> Snapshot:
        """A whole copy, O(N)."""
        return Snapshot(self.keys_H2nd.clone(), self.table_ND.clone(), self.scale)

    def restore(self, snapshot: Snapshot) -> None:
        """Bitwise back to a snapshot. Raises ValueError when shapes differ, RuntimeError in the middle of a step."""
        self.replace(snapshot.keys_H2nd, snapshot.table_ND, snapshot.scale)

    def replace(self, keys_H2nd: Tensor, table_ND: Tensor, scale: float = 1.0) -> None:
        """Set the whole state from tensors (copied). Raises ValueError when shapes differ."""
        if self._log is not None:
            raise RuntimeError("the fast state can't be replaced in the middle of a step: commit or roll back first")
        for name, old, new in (("keys", self.keys_H2nd, keys_H2nd), ("values", self.table_ND, table_ND)):
            if old.shape != new.shape:
                raise ValueError(f"the fast state's {name} have shape {tuple(old.shape)}, not {tuple(new.shape)}")
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"the running scale is {scale}; it must be finite and above 0")
        self.keys_H2nd = keys_H2nd.to(self.keys_H2nd, copy=True)
        self.table_ND.copy_(table_ND)
        self.scale = scale
        self._touch()
        self._step_overlay = None

    def save(self, path: str | Path, metadata: dict[str, str] | None = None) -> None:
        """Write the state to a file: beside, synced, then renamed, so that a crash leaves the old file or the new."""
        from megatron_fwpkm.memory.state_file import write_state_file

        if self._log is not None and self._log.entries:
            raise RuntimeError("the fast state can only be saved between steps: commit or roll back first")
        description = {"config": dataclasses.asdict(self.config), "scale": self.scale.hex(), "version": self.version}
        write_state_file(Path(path), {"keys": self.keys_H2nd, "table": self.table_ND}, description, metadata or {})

    def load(self, path: str | Path) -> dict[str, str]:
        """Read a file written by `save` into this state; returns its metadata. Nothing changes when it is refused.

        Raises:
            StateFileError: missing, truncated, damaged, of another shape or another kind of score.
        """
        from megatron_fwpkm.memory.state_file import check_fits, read_state_file

        content = read_state_file(Path(path))
        check_fits(Path(path), content, {"keys": self.keys_H2nd, "table": self.table_ND}, self.config.score_type)
        self.replace(content.tensors["keys"], content.tensors["table"], content.scale)
        self.version = content.version
        return content.user
