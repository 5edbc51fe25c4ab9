"""The trained tables of a model: the values of its PKM layers, outside DeepSpeed's optimizer.

A flat ZeRO partition would hold dense gradients and moments of all N rows. Here each table has a touched-row update
(train/touched_rows.py), and its gradients travel as row numbers and rows. Over the replicas of a data-parallel group
tables, moments and counts are bitwise equal: all start equal, and all add the same gradients in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from megatron_fwpkm.errors import SharedUserError, UserError
from megatron_fwpkm.memory.pkm_layer import PKMLayer
from megatron_fwpkm.train.touched_rows import RowGradient, RowSettings, TouchedRows, sum_row_gradients

FORMAT = "fwpkm-trained-table/1"


def table_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The values of all PKM layers of a model, by parameter name."""
    return {
        f"{name}.values" if name else "values": module.values
        for name, module in model.named_modules()
        if isinstance(module, PKMLayer) and module.values.requires_grad
    }


class TrainedTables:
    """Collects the tables' gradients during a step, joins them over the replicas, and updates or drops.

    Args:
        model: searched for PKM layers; its parameters must have their final dtype
        settings: constants of AdamW; `is_decayed` names the tables that have weight decay
        rate_share: learning rate of the tables as a share of the other parameters'
        clipping: largest global gradient norm, 0 for none
        group: the data-parallel group; None means all ranks, or this process alone outside a process group

    A step is: `begin_step`, backward passes, `join_norm` (all replicas together), then `apply` or `discard`.
    Raises SharedUserError when a PKM layer is set to dense gradients.
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
    ) -> None:
        for name, module in model.named_modules():
            if isinstance(module, PKMLayer) and not module.config.sparse_gradients:
                raise SharedUserError(
                    f"the PKM layer {name} has dense gradients; set model.pkm.sparse_gradients to true"
                )
        self._group, self._rate_share, self._clipping = group, rate_share, clipping
        self._tables: dict[str, TouchedRows] = {}
        self._gradients: dict[str, RowGradient] | None = None  # None outside steps
        self._joined = False
        plain = RowSettings(settings.betas, settings.epsilon, 0.0)
        for name, values in table_parameters(model).items():
            self._tables[name] = TouchedRows(values, settings if is_decayed(name) else plain)
            values.register_post_accumulate_grad_hook(partial(self._collect, name))

    def __len__(self) -> int:
        return len(self._tables)

    def __getitem__(self, name: str) -> TouchedRows:
        """The table of a parameter name."""
        return self._tables[name]

    @property
    def _replicas(self) -> int:
        return torch.distributed.get_world_size(self._group) if torch.distributed.is_initialized() else 1

    # -- steps ----------------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """From here on gradients are collected; those of a step that was not finished are dropped."""
        self._gradients, self._joined = {}, False

    def _collect(self, name: str, values: Tensor) -> None:
        """Take a microbatch's gradient from the parameter, so that sums are made in the updates' precision."""
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

        The same bits on all replicas, which call it together.
        """
        assert self._gradients is not None, "begin_step comes before the backward passes"
        if not self._tables:
            return others
        gradients = [self._gradients.get(name) or table.no_gradient() for name, table in self._tables.items()]
        if self._replicas > 1:
            gradients = self._average(gradients)
        self._gradients, self._joined = dict(zip(self._tables, gradients, strict=True)), True
        norms = [torch.linalg.vector_norm(gradient.gradient_UD) for gradient in gradients]
        return torch.linalg.vector_norm(torch.stack([others, *(norm.to(others) for norm in norms)]))

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

    def save(self, folder: Path) -> None:
        """Write one safetensors file a table, as the first replica; the other replicas hold the same and write nothing.

        All rows of the table, and of the rows that ever were updated the moments and counts. `first_row` in the
        description places a shard in the whole table.
        """
        from safetensors.torch import save_file

        leads = not torch.distributed.is_initialized() or torch.distributed.get_rank(self._group) == 0
        if not self._tables or not leads:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in self._tables.items():
            rows_U = table.updates_N.nonzero().view(-1)
            tensors = {
                "table": table.master_ND,
                "clock": table.clock_N,
                "rows": rows_U,
                "updates": table.updates_N[rows_U],
                "first_moment": table.first_moment_ND[rows_U],
                "second_moment": table.second_moment_ND[rows_U],
            }
            description = {"clock": table.clock.hex(), "rows": len(table.updates_N), "first_row": 0}
            save_file(
                {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()},
                folder / f"{name}.safetensors",
                {"format": FORMAT, "description": json.dumps(description)},
            )

    def load(self, folder: Path) -> None:
        """Read what `save` wrote; every rank reads. Raises UserError when a file is missing or doesn't fit."""
        for name, table in self._tables.items():
            path = folder / f"{name}.safetensors"
            try:
                table.load_state_dict(_read(path, table))
            except Exception as error:
                raise UserError(
                    f"the trained table {path} can't be loaded ({error}); use another checkpoint, or the configuration "
                    "of the run that wrote it"
                ) from error


def _read(path: Path, table: TouchedRows) -> dict[str, Any]:
    """A state for `TouchedRows.load_state_dict` from a file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt", device=str(table.master_ND.device)) as file:
        metadata = file.metadata() or {}
        found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    if metadata.get("format") != FORMAT:
        raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT}")
    description, rows_U = json.loads(metadata["description"]), found["rows"]
    if description["rows"] != len(table.updates_N) or description["first_row"] != 0:
        raise ValueError(f"it has {description['rows']} rows, this table {len(table.updates_N)}")
    return {
        "master_ND": found["table"],
        "first_moment_ND": torch.zeros_like(table.first_moment_ND).index_copy_(0, rows_U, found["first_moment"]),
        "second_moment_ND": torch.zeros_like(table.second_moment_ND).index_copy_(0, rows_U, found["second_moment"]),
        "updates_N": torch.zeros_like(table.updates_N).index_copy_(0, rows_U, found["updates"]),
        "clock_N": found["clock"],
        "clock": float.fromhex(description["clock"]),
    }
