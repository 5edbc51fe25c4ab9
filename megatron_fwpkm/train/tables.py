"""The trained tables of a model: the values of its PKM layers, outside DeepSpeed's optimizer.

A flat ZeRO partition would hold dense gradients and moments of all N rows. Here each table has a touched-row update
(train/touched_rows.py), and its gradients travel as row numbers and rows. Where a table is spread over the ranks of a
replica, each has the gradients, moments and file of its own rows, and no rank ever has the whole. Over the replicas of
a data-parallel group, which hold the same rows, tables, moments and counts are bitwise equal: all start equal, and all
add the same gradients in the same order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from megatron_fwpkm.errors import SharedUserError, UserError
from megatron_fwpkm.memory.pkm_layer import PKMLayer, named_slow_weights, slow_tables
from megatron_fwpkm.memory.slow_table import SlowTable, whole_table
from megatron_fwpkm.train.touched_rows import RowGradient, RowSettings, TouchedRows, sum_row_gradients

FORMAT = "fwpkm-trained-table/1"


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
        self._shards = {n: table for n, table in slow_tables(model).items() if table.values_ND.requires_grad}
        self._tables: dict[str, TouchedRows] = {}
        self._gradients: dict[str, RowGradient] | None = None  # None outside steps
        self._joined = False
        plain = RowSettings(settings.betas, settings.epsilon, 0.0)
        for name, table in self._shards.items():
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
        for table in self._shards.values():
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

    def save(self, folder: Path) -> None:
        """Write one safetensors file for each table of this rank, as the first replica; the others hold the same.

        All rows of the table, and of the rows that ever were updated the moments and counts. The description tells
        which rank's rows they are, of how many (`routing.owned_slots`).
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
            shard = self._shards[name]
            description = {
                "clock": table.clock.hex(),
                "rows": len(table.updates_N),
                "n_subkeys": shard.config.n_subkeys,
                "rank": shard.rank,
                "ranks": shard.ranks,
            }
            save_file(
                {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()},
                folder / _file_name(name, shard.rank, shard.ranks),
                {"format": FORMAT, "description": json.dumps(description)},
            )

    def load(self, folder: Path) -> None:
        """Read what `save` wrote; every rank reads its rows. Raises UserError when a file is missing or doesn't fit."""
        for name, table in self._tables.items():
            path = folder / _file_name(name, self._shards[name].rank, self._shards[name].ranks)
            try:
                _check_ranks(folder, name, self._shards[name].ranks)
                table.load_state_dict(_read(path, table, self._shards[name]))
            except Exception as error:
                raise UserError(
                    f"the trained table {path} can't be loaded ({error}); use another checkpoint, or the configuration "
                    "of the run that wrote it"
                ) from error


_FILE_NAME = re.compile(r"(?P<name>.+?)(\.rank_(?P<rank>\d{5})_of_(?P<ranks>\d{5}))?\.safetensors")


def _file_name(name: str, rank: int, ranks: int) -> str:
    """File of one rank's rows of a table."""
    return f"{name}.safetensors" if ranks == 1 else f"{name}.rank_{rank:05d}_of_{ranks:05d}.safetensors"


def _files(folder: Path) -> dict[str, dict[tuple[int, int], Path]]:
    """By name of a table and (rank, ranks): the files that `save` wrote."""
    found: dict[str, dict[tuple[int, int], Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        match = _FILE_NAME.fullmatch(path.name)
        assert match is not None
        found.setdefault(match["name"], {})[int(match["rank"] or 0), int(match["ranks"] or 1)] = path
    return found


def _check_ranks(folder: Path, name: str, ranks: int) -> None:
    """Raise ValueError when the table was written by another number of ranks."""
    written = {of for _, of in _files(folder).get(name, {})}
    if written and ranks not in written:
        raise ValueError(
            f"its rows were spread over {max(written)} tensor-parallel ranks and this job has {ranks}: start it with "
            f"parallel.tensor={max(written)}"
        )


def read_tables(folder: Path) -> dict[str, Tensor]:
    """The whole tables [n², D] that `TrainedTables.save` wrote, by name, over however many ranks they were spread.

    Raises ValueError when a rank's file is missing.
    """
    from safetensors import safe_open

    whole = {}
    for name, files in _files(folder).items():
        ranks = max(of for _, of in files)
        if set(files) != {(rank, ranks) for rank in range(ranks)}:
            raise ValueError(f"{folder} has {len(files)} files of the table {name}, not those of {ranks} ranks")
        shards, n_subkeys = [], 0
        for rank in range(ranks):
            with safe_open(files[rank, ranks], framework="pt") as file:
                shards.append(file.get_tensor("table"))
                if ranks > 1:
                    n_subkeys = json.loads(file.metadata()["description"])["n_subkeys"]
        whole[name] = whole_table(shards, n_subkeys)
    return whole


def _read(path: Path, table: TouchedRows, shard: SlowTable) -> dict[str, Any]:
    """A state for `TouchedRows.load_state_dict` from a file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt", device=str(table.master_ND.device)) as file:
        metadata = file.metadata() or {}
        found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    if metadata.get("format") != FORMAT:
        raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT}")
    description, rows_U = json.loads(metadata["description"]), found["rows"]
    if description["rows"] != len(table.updates_N):
        raise ValueError(f"it has {description['rows']} rows, this table {len(table.updates_N)}")
    # Files of one rank may lack these entries.
    layout = (
        description.get("n_subkeys", shard.config.n_subkeys),
        description.get("rank", 0),
        description.get("ranks", 1),
    )
    if layout != (shard.config.n_subkeys, shard.rank, shard.ranks):
        raise ValueError(
            f"it has the rows of rank {layout[1]} of {layout[2]} of {layout[0]} sub-keys, this is rank {shard.rank} of "
            f"{shard.ranks} of {shard.config.n_subkeys}"
        )
    return {
        "master_ND": found["table"],
        "first_moment_ND": torch.zeros_like(table.first_moment_ND).index_copy_(0, rows_U, found["first_moment"]),
        "second_moment_ND": torch.zeros_like(table.second_moment_ND).index_copy_(0, rows_U, found["second_moment"]),
        "updates_N": torch.zeros_like(table.updates_N).index_copy_(0, rows_U, found["updates"]),
        "clock_N": found["clock"],
        "clock": float.fromhex(description["clock"]),
    }
