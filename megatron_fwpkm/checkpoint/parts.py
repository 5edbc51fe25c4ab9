"""What a checkpoint is made of: owners of state, each of which tells what this rank has of which whole tensors.

    slow/<parameter>                     fp32 weights; of PKM layers the values, too
    first_moment/, second_moment/...     AdamW's, of each
    updates/, clock/, clock_now/...      of the values of PKM layers (train/touched_rows.py)
    fast_state/memory_00000/block_001/   keys, values, scale, version of each memory that is written on its own
    random/rank_00000/                   random generators of each rank

Names are those of the whole model, whatever the layout. Tensors whose name ends with BY_SLOT have their rows in the
order of memory/slot_order.py. Nothing here makes a collective call, unless it says so: an error on one rank leaves no
other waiting.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatron_fwpkm.checkpoint.engine_state import EngineState
from megatron_fwpkm.checkpoint.pieces import Pieces, Staging
from megatron_fwpkm.checkpoint.tensors import SavedTensors
from megatron_fwpkm.errors import UserError
from megatron_fwpkm.memory import FastState
from megatron_fwpkm.memory.slot_order import OwnedRows, owned_rows
from megatron_fwpkm.model.decoder import BlockStack
from megatron_fwpkm.parallel.tensor_layout import split_dimension
from megatron_fwpkm.parallel.topology import Topology
from megatron_fwpkm.train.settings import MemoryPolicy
from megatron_fwpkm.train.tables import TrainedTables

BY_SLOT = ".by_slot"
WEIGHTS = "slow/"
_STEPS = "optimizer_steps"
_EMBEDDING = WEIGHTS + "embedding.weight"


class CheckpointPart(Protocol):
    """Owner of a part of a job's state."""

    def pieces(self, staging: Staging) -> dict[str, Pieces]:
        """What this rank has, by the whole tensor's name: views of what the job works with, or copies in `staging`."""

    def load(self, source: SavedTensors) -> list[str]:
        """Take everything over, bitwise where nothing has to be changed; returns notes for the user."""

    def finish_loading(self) -> None:
        """What ranks have to do together once all have loaded; all call this."""


class SlowWeights:
    """The parameters of a model in a DeepSpeed engine, and AdamW's moments of them.

    A checkpoint may have weights and no moments (convert/begin_run.py writes those): they then begin at zero.
    """

    def __init__(self, state: EngineState, topology: Topology) -> None:
        self._state, self._topology = state, topology

    def pieces(self, staging: Staging) -> dict[str, Pieces]:
        """Of a weight that two stages share those of the first; what all replicas have is one's to write."""
        found, place = {}, self._topology
        for number, (name, parameter, run) in enumerate(self._state.runs()):
            if getattr(parameter, "ds_pipe_replicated", False):
                continue
            if self._state.is_replicated and number % place.replicas != place.replica:
                continue
            found[WEIGHTS + name] = self._of_run(parameter, run.weight, run.start)
            for moment, values in run.moments.items():
                found[f"{moment}/{name}"] = self._of_run(parameter, values, run.start)
        steps = self._state.steps()
        if place.is_leader:  # one number for all
            found[_STEPS] = Pieces.whole(torch.tensor(steps))
        return found

    def load(self, source: SavedTensors) -> list[str]:
        """Fp32 weights and moments in place; weights that the model computes with are cast from whole fp32 ones."""
        runs, trained = {}, _STEPS in source.descriptions
        for name, parameter, run in self._state.runs():
            runs[name] = run
            wanted = {f"{moment}/{name}": values for moment, values in run.moments.items()} if trained else {}
            if self._state.divides_weights:
                wanted[WEIGHTS + name] = run.weight
            source.read({key: self._of_run(parameter, values, run.start) for key, values in wanted.items()})
        if not self._state.divides_weights:
            for name, parameter in self._state.parameters.items():
                wide = torch.promote_types(parameter.dtype, torch.float32)
                weight = torch.empty(parameter.numel(), dtype=wide)
                source.read({WEIGHTS + name: self._of_run(parameter, weight, 0)})
                with torch.no_grad():
                    parameter.copy_(weight.view_as(parameter))
                    if name in runs:
                        run = runs[name]
                        run.weight.copy_(weight[run.start : run.start + run.weight.numel()])
        if not trained:
            return ["the checkpoint has weights and memories alone: the optimizer begins anew"]
        self._state.set_steps(int(source.number(_STEPS)))
        return []

    def finish_loading(self) -> None:
        """ZeRO-3 gathers what it keeps whole."""
        self._state.spread_weights()

    def _of_run(self, parameter: nn.Parameter, values: Tensor, start: int) -> Pieces:
        place = self._topology
        shape, split = self._state.shape_of(parameter), split_dimension(parameter)
        return Pieces.of_run(values, start, shape, split, place.tensor_rank, place.tensor_ranks)


class SlotRows:
    """Where a rank's rows of a table of slots, or its columns of all rows, are in a checkpoint.

    Args:
        n_subkeys: n; the whole table has n * n rows
        rank: of the ranks that the rows are spread over
        ranks: their number
        columns: this rank's columns, where all rows are here; None: all columns
        width: columns of the whole table
    """

    def __init__(self, n_subkeys: int, width: int, rank: int = 0, ranks: int = 1, columns: slice | None = None) -> None:
        self._slots, self._width = n_subkeys**2, width
        self._columns = columns or slice(0, width)
        self._owned: OwnedRows = owned_rows(n_subkeys, rank, ranks)
        self._rows = n_subkeys * -(-n_subkeys // ranks)

    def pieces(self, name: str, table: Tensor, staging: Staging) -> Pieces:
        """Of a rank's table [N, D], or of one number for each row [N]: a copy on the CPU, in the order of files."""
        rows = self._owned.rows.to(table.device)
        ordered = staging.buffer(name, (len(rows), *table.shape[1:]), table.dtype)
        if table.device == ordered.device:
            torch.index_select(table.detach(), 0, rows, out=ordered)
        else:
            copy_in_portions(table.detach(), rows, ordered)
        return self._pieces(ordered, owned=True)

    def read(self, source: SavedTensors, name: str, like: Tensor) -> Tensor:
        """A rank's table of a checkpoint, on the CPU, of the shape and dtype of `like`; 0 in rows that are nobody's."""
        ordered = torch.empty(len(self._owned.rows), *like.shape[1:], dtype=like.dtype)
        source.read({name: self._pieces(ordered)})
        table = torch.zeros(self._rows, *like.shape[1:], dtype=like.dtype)
        return table.index_copy_(0, self._owned.rows, ordered)

    def _pieces(self, ordered: Tensor, owned: bool = False) -> Pieces:
        first = [] if ordered.dim() == 1 else [self._columns.start]
        shape = (self._slots,) if ordered.dim() == 1 else (self._slots, self._width)
        pieces, place = [], 0
        for start, stop in self._owned.runs:
            pieces.append(([start, *first], ordered[place : place + stop - start]))
            place += stop - start
        return Pieces(shape, ordered.dtype, pieces, owned=owned)


def copy_in_portions(table: Tensor, rows: Tensor, target: Tensor, most_bytes: int = 1 << 26) -> None:
    """Copy rows of a table on a device: on it, a whole table more may be more than is left."""
    portion = max(1, most_bytes // max(table[:1].nbytes, 1))
    for some, part in zip(rows.split(portion), target.split(portion), strict=True):
        part.copy_(table.index_select(0, some))


class TableValues:
    """The values of PKM layers: table, moments, counts and clocks of its rows, each on the ranks of one replica.

    Args:
        tables: what trains them
        name_of: from the model's names to those in a checkpoint
        replica: this rank's
        replicas: their number; each writes some of what all have
    """

    def __init__(
        self, tables: TrainedTables, name_of: Callable[[str], str] = str, replica: int = 0, replicas: int = 1
    ) -> None:
        self._replica, self._replicas = replica, replicas
        self._tables = {
            name_of(name): (tables[name], SlotRows(shard.config.n_subkeys, shard.config.v_dim, shard.rank, shard.ranks))
            for name, shard in tables.shards.items()
        }

    def pieces(self, staging: Staging) -> dict[str, Pieces]:
        """All replicas have the same: every one writes its share of the tensors."""
        found: dict[str, Pieces] = {}
        number = 0
        for name, (table, rows) in self._tables.items():
            state = table.state_dict()
            for key, tensor in _TABLE.items():
                saved = f"{key}{name}{BY_SLOT}"
                if number % self._replicas == self._replica:
                    found[saved] = rows.pieces(saved, state[tensor], staging)
                number += 1
            found[_CLOCK_NOW + name] = Pieces.whole(torch.tensor(table.clock, dtype=torch.float64))
        return found

    def load(self, source: SavedTensors) -> list[str]:
        """This rank's rows."""
        for name, (table, rows) in self._tables.items():
            state = table.state_dict()
            trained = _CLOCK_NOW + name in source.descriptions
            kinds = {key: tensor for key, tensor in _TABLE.items() if trained or key == WEIGHTS}
            read = {tensor: rows.read(source, f"{key}{name}{BY_SLOT}", state[tensor]) for key, tensor in kinds.items()}
            clock = source.number(_CLOCK_NOW + name) if trained else state["clock"]
            table.load_state_dict({**state, **read, "clock": clock})
        return []

    def finish_loading(self) -> None:
        """Nothing."""


_TABLE = {
    WEIGHTS: "master_ND",
    "first_moment/": "first_moment_ND",
    "second_moment/": "second_moment_ND",
    "updates/": "updates_N",
    "clock/": "clock_N",
}
_CLOCK_NOW = "clock_now/"


@dataclass
class _Memory:
    """A memory of a checkpoint, as much of it as a rank has."""

    keys: Tensor
    table: Tensor
    scale: float
    version: int


class FastStates:
    """The memories of a model: one for all replicas that write together, each on the ranks that it is spread over.

    Args:
        model: searched for memories
        topology: this rank among all
        policy: what becomes of the memories where a checkpoint has another number of them; None: that is an error
    """

    def __init__(self, model: BlockStack, topology: Topology, policy: MemoryPolicy | None = None) -> None:
        self._states = list(model.fast_states())
        self._policy = policy
        place = topology.placement
        self._rank, self._ranks = place.memory_rank, place.memory_ranks
        self.memories = topology.replicas // place.replicas
        """Memories of the job, each written by its replicas alone."""
        self._memory = topology.replica // place.replicas

    def pieces(self, staging: Staging) -> dict[str, Pieces]:
        """This rank's rows or columns of its memory, unfolded: table and running scale."""
        found: dict[str, Pieces] = {}
        for index, state in self._states:
            found |= memory_pieces(state, fast_name(self._memory, index), staging, self._rank, self._ranks)
        return found

    def load(self, source: SavedTensors) -> list[str]:
        """By the policy where the number of memories differs. Raises UserError where it does and there is none."""
        if not self._states:
            return []
        there = count_memories(source)
        if not there:
            raise ValueError("it has no memories")
        sources, note = self._sources(there)
        for index, state in self._states:
            if sources:
                names = [fast_name(memory, index) for memory in sources]
                load_memory(state, names, source, self._rank, self._ranks)
        return [note] if note else []

    def _sources(self, there: int) -> tuple[list[int], str]:
        """Which of a checkpoint's memories this rank's is made of, and a note."""
        carried = any(state.config.reset == "carry" for _, state in self._states)
        if there == self.memories or not carried:  # those that are not carried are alike, and as they began
            return [self._memory % there], ""
        memories = f"{there} {'memory' if there == 1 else 'memories'} a layer"
        if self._policy is None:
            raise UserError(
                f"it has {memories}, one for each group of replicas that write together, and this job {self.memories}: "
                "say what becomes of them with checkpoint.memories=keep (memory i goes on with memory i modulo "
                f"{there}), first (all with the first), average (all with the mean of all) or reset (all begin anew)"
            )
        chosen = {"keep": [self._memory % there], "first": [0], "average": list(range(there)), "reset": []}
        note = f"{memories} in the checkpoint became {self.memories} (checkpoint.memories={self._policy})"
        return chosen[self._policy], note

    def finish_loading(self) -> None:
        """Nothing."""


def memory_pieces(state: FastState, name: str, staging: Staging, rank: int = 0, ranks: int = 1) -> dict[str, Pieces]:
    """What this rank has of one memory, unfolded: table and running scale."""
    values = f"{name}/values{BY_SLOT}"
    return {
        f"{name}/keys": Pieces.whole(state.keys_H2nd),
        values: _rows_of(state, rank, ranks).pieces(values, state.table_ND, staging),
        f"{name}/scale": Pieces.whole(torch.tensor(state.scale, dtype=torch.float64)),
        f"{name}/version": Pieces.whole(torch.tensor(state.version)),
    }


def load_memory(state: FastState, names: Sequence[str], source: SavedTensors, rank: int = 0, ranks: int = 1) -> None:
    """Set a memory: to one of a checkpoint, bit by bit, or to the mean of several's sub-keys and true values."""
    memories = (_read_memory(state, name, source, _rows_of(state, rank, ranks)) for name in names)
    total = next(memories)
    if len(names) > 1:
        total.table, total.scale = total.table * total.scale, 1.0
    for memory in memories:
        total.keys += memory.keys
        total.table += memory.table * memory.scale
        total.version = max(total.version, memory.version)
    if len(names) > 1:
        total.keys, total.table = total.keys / len(names), total.table / len(names)
    state.replace(total.keys, total.table, total.scale)
    state.version = total.version


def _read_memory(state: FastState, name: str, source: SavedTensors, rows: SlotRows) -> _Memory:
    keys = torch.empty_like(state.keys_H2nd, device="cpu")
    source.read({f"{name}/keys": Pieces.whole(keys)})
    table = rows.read(source, f"{name}/values{BY_SLOT}", state.table_ND)
    return _Memory(keys, table, source.number(f"{name}/scale"), int(source.number(f"{name}/version")))


def _rows_of(state: FastState, rank: int, ranks: int) -> SlotRows:
    config = state.config
    if state.owned is None:
        return SlotRows(config.n_subkeys, config.v_dim, columns=state.columns)
    return SlotRows(config.n_subkeys, config.v_dim, rank, ranks)


def fast_name(memory: int, block: int) -> str:
    """Folder of one memory's tensors."""
    return f"fast_state/memory_{memory:05d}/block_{block:03d}"


def embedding_rows(source: SavedTensors, tensor_ranks: int = 1, tokens: int = 0) -> int:
    """Rows of the embedding of a checkpoint, which a model has to have to load it.

    Raises ValueError where they can't be split evenly over so many ranks, or are fewer than a tokenizer's tokens.
    """
    found = source.descriptions.get(_EMBEDDING)
    if found is None:
        raise ValueError(f"there is no tensor {_EMBEDDING}")
    rows = found.shape[0]
    if rows % tensor_ranks:
        raise ValueError(f"its embedding has {rows} rows, which can't be split over parallel.tensor={tensor_ranks}")
    if rows < tokens:
        raise ValueError(f"its embedding has {rows} rows, and the tokenizer of the data {tokens} tokens")
    return rows


def count_memories(source: SavedTensors) -> int:
    """Memories of each layer that a checkpoint has: one for each group of replicas that wrote together."""
    return len({name.split("/")[1] for name in source.descriptions if name.startswith("fast_state/")})


class RandomGenerators:
    """The random generators of torch (CPU and this rank's GPU) and Python. Training draws nothing from them."""

    def __init__(self, topology: Topology) -> None:
        self._name = f"random/rank_{topology.rank:05d}"

    def pieces(self, staging: Staging) -> dict[str, Pieces]:
        """This rank's generators."""
        python = torch.frombuffer(bytearray(json.dumps(random.getstate()).encode()), dtype=torch.uint8)
        states = {"torch": torch.get_rng_state(), "python": python}
        if torch.cuda.is_available():
            states["cuda"] = torch.cuda.get_rng_state()
        return {f"{self._name}/{name}": Pieces.whole(state) for name, state in states.items()}

    def load(self, source: SavedTensors) -> list[str]:
        """This rank's generators; those of ranks that did not exist go on as they are."""
        if f"{self._name}/torch" in source.descriptions:
            torch.set_rng_state(source.whole(f"{self._name}/torch"))
            random.setstate(_as_tuples(json.loads(source.whole(f"{self._name}/python").numpy().tobytes())))
        if f"{self._name}/cuda" in source.descriptions and torch.cuda.is_available():
            torch.cuda.set_rng_state(source.whole(f"{self._name}/cuda"))
        return []

    def finish_loading(self) -> None:
        """Nothing."""


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list | tuple) else value
