"""The trained tables of a model: the values of its PKM layers, outside DeepSpeed's optimizer.

A flat ZeRO partition would hold dense gradients and moments of all N rows. Here each table has a touched-row update
(train/touched_rows.py), and its gradients travel as row numbers and rows. Where a table is spread over the ranks of a
replica, each has the gradients, moments and file of its own rows, and no rank ever has the whole. Over the replicas of
a data-parallel group, which hold the same rows, tables, moments and counts are bitwise equal: all start equal, and all
add the same gradients in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from megatron_fwpkm.errors import SharedUserError
from megatron_fwpkm.memory.pkm_layer import PKMLayer, named_slow_weights, slow_tables
from megatron_fwpkm.memory.slow_table import SlowTable
from megatron_fwpkm.train.touched_rows import RowGradient, RowSettings, TouchedRows, sum_row_gradients


class TrainedTables:
    """Collects the tables' gradients during a step, joins them over the replicas, and updates or drops.

    Args:
        model: searched for PKM layers; its parameters must have their final dtype
        settings: constants of AdamW; `is_decayed` names the tables that have weight decay
        rate_share: learning rate of the tables as a share of the other parameters'
        clipping: largest global gradient norm, 0 for none
        group: the data-parallel group: ranks with the same rows of the same tables. None means all ranks, or this
            process alone outside a process group
        model_group: the ranks of one replica, which have different tables or different rows of them; None: this alone

    A step is: `begin_step`, backward passes, `join_norm` (all ranks together), then `apply` or `discard`. All ranks
    make this object together: tables start as those of the first replica.

    Attributes:
        exist: whether this or another rank of the replica has a table
        shards: the tables of this rank, by parameter name

    Raises SharedUserError when a PKM layer is set to dense gradients, ValueError when a table is spread over more
    ranks than `model_group` has.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: RowSettings,
        *,
        is_decayed: Callable[[str], bool] = lambda name: True,
        rate_share: float = 1.0,
        clipping: float = 0.0,
        group: torch.distributed.ProcessGroup | None = None,
        model_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        layers = {name: module for name, module in model.named_modules() if isinstance(module, PKMLayer)}
        for name, layer in layers.items():
            if not layer.config.sparse_gradients:
                raise SharedUserError(
                    f"the PKM layer {name} has dense gradients; set model.pkm.sparse_gradients to true"
                )
            layer.match_values()  # DeepSpeed casts the parameters that it knows
        self._group, self._model_group = group, model_group
        self._rate_share, self._clipping = rate_share, clipping
        self._device = next((weight.device for _, weight in named_slow_weights(model)), torch.device("cpu"))
        self.shards = {n: table for n, table in slow_tables(model).items() if table.values_ND.requires_grad}
        self._tables: dict[str, TouchedRows] = {}
        self._gradients: dict[str, RowGradient] | None = None  # None outside steps
        self._joined = False
        plain = RowSettings(settings.betas, settings.epsilon, 0.0)
        for name, table in self.shards.items():
            self._check_spread(name, table)
            values = table.values_ND
            if self._replicas > 1:
                torch.distributed.broadcast(values.detach(), group=group, group_src=0)
            self._tables[name] = TouchedRows(values, settings if is_decayed(name) else plain)
            values.register_post_accumulate_grad_hook(partial(self._collect, name))
        self.exist = bool(self._over_replica(torch.tensor(float(len(self)), dtype=torch.float64)).any())

    def __len__(self) -> int:
        return len(self._tables)

    def __getitem__(self, name: str) -> TouchedRows:
        """The table of a parameter name."""
        return self._tables[name]

    @property
    def _replicas(self) -> int:
        return torch.distributed.get_world_size(self._group) if torch.distributed.is_initialized() else 1

    def _check_spread(self, name: str, table: SlowTable) -> None:
        ranks = 1 if self._model_group is None else torch.distributed.get_world_size(self._model_group)
        if ranks % table.ranks:
            raise ValueError(
                f"the table {name} is spread over {table.ranks} ranks and model_group has {ranks}: it must have all "
                "ranks of a replica"
            )

    # -- steps ----------------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """From here on gradients are collected; what is there from before, of an aborted step or none, is dropped."""
        for table in self.shards.values():
            table.values_ND.grad = None
        self._gradients, self._joined = {}, False

    def _collect(self, name: str, values: Tensor) -> None:
        """Take a microbatch's gradient from the table, so that sums are made in the updates' precision."""
        if self._gradients is None or values.grad is None:
            return
        parts = [self._tables[name].row_gradient(values.grad)]
        if name in self._gradients:
            parts.insert(0, self._gradients[name])
        self._gradients[name] = sum_row_gradients(parts)
        values.grad = None

    @torch.no_grad()
    def join_norm(self, others: Tensor) -> Tensor:
        """Average the step's gradients over the replicas; the norm of these and of all `others`, whose norm is given.

        The gradients of all tables of the replica count, on whichever of its ranks they are; `others` is the norm of
        all others of the replica. The same bits on all ranks, which call it together.
        """
        assert self._gradients is not None, "begin_step comes before the backward passes"
        gradients = [self._gradients.get(name) or table.no_gradient() for name, table in self._tables.items()]
        if self._tables and self._replicas > 1:
            gradients = self._average(gradients)
        self._gradients, self._joined = dict(zip(self._tables, gradients, strict=True)), True
        if not self.exist:
            return others
        # In float64: the square of a large norm must not become infinite.
        norms = [torch.linalg.vector_norm(gradient.gradient_UD).to(others.device).double() for gradient in gradients]
        own = torch.linalg.vector_norm(torch.stack([*norms, others.new_zeros((), dtype=torch.float64)]))
        return torch.linalg.vector_norm(torch.cat([others.view(1), self._over_replica(own).to(others)]))

    def _over_replica(self, number: Tensor) -> Tensor:
        """A number of each rank of the replica, in order: what is made of them is bitwise the same on all."""
        number = number.view(1).to(self._device)
        if self._model_group is None:
            return number
        numbers = number.new_empty(torch.distributed.get_world_size(self._model_group))
        torch.distributed.all_gather_into_tensor(numbers, number, group=self._model_group)
        return numbers

    def _average(self, own: list[RowGradient]) -> list[RowGradient]:
        """Exchange row numbers and rows of all tables in three gathers; uneven shares are padded to the largest."""
        device, widths = own[0].rows_U.device, [gradient.gradient_UD.shape[1] for gradient in own]
        counts_L = torch.tensor([gradient.rows_U.numel() for gradient in own], device=device)
        counts_RL: list[list[int]] = self._gather(counts_L, len(own)).tolist()
        sizes = [sum(count * width for count, width in zip(counts, widths, strict=True)) for counts in counts_RL]
        rows = self._gather(torch.cat([gradient.rows_U for gradient in own]), max(map(sum, counts_RL)))
        values = self._gather(torch.cat([gradient.gradient_UD.flatten() for gradient in own]), max(sizes))
        parts: list[list[RowGradient]] = [[] for _ in own]
        for counts, rows_P, values_P in zip(counts_RL, rows, values, strict=True):
            for table, (count, width) in enumerate(zip(counts, widths, strict=True)):
                gradient_UD, values_P = values_P[: count * width].view(count, width), values_P[count * width :]
                parts[table].append(RowGradient(rows_P[:count], gradient_UD))
                rows_P = rows_P[count:]
        summed = [sum_row_gradients(of_table) for of_table in parts]
        return [RowGradient(total.rows_U, total.gradient_UD / self._replicas) for total in summed]

    def _gather(self, own: Tensor, size: int) -> Tensor:
        """[replicas, size] from each replica's vector, padded to `size` at its end."""
        padded = nn.functional.pad(own, (0, size - own.numel()))
        gathered = padded.new_empty(self._replicas * size)
        if size:
            torch.distributed.all_gather_into_tensor(gathered, padded, group=self._group)
        return gathered.view(self._replicas, size)

    @torch.no_grad()
    def apply(self, learning_rate: float, gradient_norm: Tensor | float) -> None:
        """Update all tables, clipped by the global norm as DeepSpeed clips the other parameters.

        Raises RuntimeError when the step's gradients were not joined over the replicas.
        """
        if not self._tables:
            self._gradients = None
            return
        if self._gradients is None or not self._joined:
            raise RuntimeError("the gradients of the trained tables were not joined: join_norm comes before apply")
        for name, table in self._tables.items():
            gradient = self._gradients[name]
            if self._clipping > 0:
                device = gradient.gradient_UD.device
                norm = torch.as_tensor(gradient_norm, dtype=table.master_ND.dtype, device=device)
                excess = ((norm + 1e-6) / self._clipping).clamp(min=1.0)
                gradient = RowGradient(gradient.rows_U, gradient.gradient_UD * (1.0 / excess))
            table.update(gradient, learning_rate * self._rate_share)
        self.discard()

    def discard(self) -> None:
        """End a step that changes nothing: neither values nor moments, counts or clocks."""
        self._gradients, self._joined = None, False

    def settle(self) -> None:
        """Give all rows the decay that they have missed, as before an export. O(N)."""
        for table in self._tables.values():
            table.settle()

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """State of every table by parameter name, by reference."""
        return {name: table.state_dict() for name, table in self._tables.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over (copy) the state of every table. Raises ValueError when it is of other tables."""
        if set(state) != set(self._tables):
            raise ValueError(f"the state has tables {sorted(state)}, the model {sorted(self._tables)}")
        for name, table in self._tables.items():
            table.load_state_dict(state[name])
