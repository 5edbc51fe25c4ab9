"""The cells of the equivalence matrix: layouts, and what is trained in them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Literal

SUBKEYS = 5
"""Of the memories that are trained."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One layout and what is trained in it."""

    tensor: int = 1
    sequence_parallel: bool = False
    pipeline: int = 1
    replicas: int = 1
    zero: int = 1
    accumulation: int = 1
    sharding: Literal["slots", "columns"] = "slots"
    routing: Literal["dynamic", "static"] = "dynamic"
    memory_replicas: Literal["independent", "synced"] = "independent"
    optimizer: Literal["adamw", "sgd"] = "adamw"
    precision: Literal["float32", "float64"] = "float32"
    tied: bool = True
    reset: Literal["carry", "per_step", "per_sequence", "per_document"] = "carry"
    documents: bool = False
    """Whether sequences hold several documents, which are kept apart."""
    one_owner: bool = False
    """Whether all queries choose the same slot."""
    incidents: bool = False
    """Whether there is a measurement in the middle of training and a step that is not finite."""
    recompute: bool = False
    """Whether sublayers are computed again in the backward pass."""
    seed: int = 1

    @property
    def processes(self) -> int:
        """Ranks of the layout."""
        return self.tensor * self.pipeline * self.replicas

    @property
    def valid(self) -> bool:
        """Whether there is such a layout."""
        return not (
            (self.sequence_parallel and self.tensor == 1)
            or (self.pipeline > 1 and self.zero > 1)
            or (self.sharding == "columns" and (self.tensor == 1 or self.memory_replicas == "synced"))
            or (self.routing == "static" and (self.sharding == "columns" or self.memory_ranks == 1))
            or (self.sharding == "slots" and self.memory_ranks > SUBKEYS)
            or (self.memory_replicas == "synced" and (self.replicas == 1 or self.reset == "per_document"))
            # ZeRO 1 to 3 keep float32 copies of the weights.
            or (self.precision == "float64" and self.zero > 0)
            # Without ZeRO it is our AdamW that clips.
            or (self.optimizer == "sgd" and self.zero == 0)
        )

    @property
    def memory_ranks(self) -> int:
        """Ranks that a memory is spread over."""
        return self.tensor * (self.replicas if self.memory_replicas == "synced" else 1)

    def without_layout(self) -> Cell:
        """What is trained: the same for all layouts of as many replicas, which see the same data."""
        layout = ("tensor", "sequence_parallel", "pipeline", "zero", "sharding", "routing", "recompute")
        return dataclasses.replace(self, **{name: getattr(Cell, name) for name in layout})

    @property
    def name(self) -> str:
        """What differs from the plainest cell."""
        parts = [f"TP{self.tensor}", "SP" if self.sequence_parallel else "", f"PP{self.pipeline}", f"DP{self.replicas}"]
        parts += [f"ZeRO-{self.zero}", f"x{self.accumulation}"]
        for field in dataclasses.fields(self)[6:-1]:
            value = getattr(self, field.name)
            if value != field.default:
                parts.append(f"{field.name}" if value is True else f"{field.name}={value}")
        return " ".join(part for part in parts if part)


TOLERANCES = {"float32": 2e-5, "float64": 1e-9}
"""Of every tensor, normwise."""
KINDS = ("loss", "norm", "gradients", "weights", "states")
SMALLEST_MARGIN = 1e-4
"""By which every slot is chosen in a cell."""
LARGEST_ROUNDING = 7e-6
"""Of one rank's float32 in any tensor, whatever the last bits."""
SEEDS: dict[str, int] = {
    "DP1 x1": 20,
    "DP1 x1 documents": 21,
    "DP1 x1 incidents": 13,
    "DP1 x1 one_owner": 1,
    "DP1 x1 optimizer=sgd": 2,
    "DP1 x1 reset=per_document documents": 13,
    "DP1 x1 reset=per_sequence": 4,
    "DP1 x1 tied=False": 24,
    "DP1 x2": 14,
    "DP1 x2 optimizer=sgd": 2,
    "DP1 x2 reset=per_step": 11,
    "DP1 x4": 25,
    "DP1 x6": 84,
    "DP2 x1": 32,
    "DP2 x1 documents": 11,
    "DP2 x1 incidents": 3,
    "DP2 x1 memory_replicas=synced": 27,
    "DP2 x1 memory_replicas=synced documents": 14,
    "DP2 x1 memory_replicas=synced incidents": 34,
    "DP2 x1 memory_replicas=synced one_owner": 10,
    "DP2 x1 memory_replicas=synced optimizer=sgd": 20,
    "DP2 x1 memory_replicas=synced reset=per_sequence": 48,
    "DP2 x1 memory_replicas=synced tied=False": 13,
    "DP2 x1 one_owner": 5,
    "DP2 x1 optimizer=sgd": 2,
    "DP2 x1 reset=per_document documents": 17,
    "DP2 x1 reset=per_sequence": 35,
    "DP2 x1 tied=False": 19,
    "DP2 x2": 2,
    "DP2 x2 memory_replicas=synced": 33,
    "DP2 x2 memory_replicas=synced optimizer=sgd": 14,
    "DP2 x2 memory_replicas=synced reset=per_step": 114,
    "DP2 x2 optimizer=sgd": 7,
    "DP2 x2 reset=per_step": 40,
}
"""Found by find_seeds.py."""


def seed_key(cell: Cell) -> str:
    """Names what is trained, whatever the layout."""
    plain = dataclasses.replace(cell.without_layout(), seed=Cell.seed)
    return plain.name.replace("TP1 PP1 ", "").replace(" ZeRO-1", "")


def _product(**choices: Iterable[Any]) -> Iterator[Cell]:
    for values in itertools.product(*choices.values()):
        cell = Cell(**dict(zip(choices, values, strict=True)))
        if cell.valid:
            yield cell


def all_cells(processes: Iterable[int] = (1, 2, 4)) -> list[Cell]:
    """The whole matrix of so many processes, and beside it cells with one thing unusual each."""
    cells: list[Cell] = []
    for cell in _product(
        tensor=(1, 2, 4),
        sequence_parallel=(False, True),
        pipeline=(1, 2),
        replicas=(1, 2),
        zero=(0, 1, 2, 3),
        accumulation=(1, 2),
        sharding=("slots", "columns"),
        memory_replicas=("independent", "synced"),
    ):
        # Half of the cells with each optimizer, and half of those with slots with each routing.
        number = cell.zero + cell.accumulation + cell.sequence_parallel + cell.pipeline
        sgd = dataclasses.replace(cell, optimizer="sgd" if number % 2 else "adamw")
        cell = sgd if sgd.valid else cell
        static = dataclasses.replace(cell, routing="static" if (cell.accumulation + cell.zero // 2) % 2 else "dynamic")
        cells.append(static if static.valid else cell)
    layouts: list[dict[str, Any]] = [
        {"tensor": 2},
        {"tensor": 2, "sequence_parallel": True},
        {"tensor": 4, "sequence_parallel": True},
        {"tensor": 2, "sequence_parallel": True, "sharding": "columns"},
        {"pipeline": 2},
        {"pipeline": 4},
        {"pipeline": 2, "tensor": 2, "sequence_parallel": True},
        {"replicas": 2},
        {"replicas": 2, "tensor": 2, "memory_replicas": "synced"},
    ]
    unusual: list[dict[str, Any]] = [
        {"one_owner": True},
        {"incidents": True},
        {"tied": False},
        {"reset": "per_sequence"},
        {"documents": True},
        {"documents": True, "reset": "per_document"},
        {"reset": "per_step", "accumulation": 2},
        {"recompute": True},
        {"precision": "float64", "zero": 0, "accumulation": 2},
    ]
    both = [Cell(**{**layout, **what}) for layout in layouts for what in unusual]
    cells += [cell for cell in both if cell.valid]
    cells += [Cell(pipeline=2, accumulation=4, precision="float64", zero=0), Cell(pipeline=2, accumulation=4)]
    cells += [Cell(pipeline=4, accumulation=4, zero=0), Cell(pipeline=4, accumulation=6)]
    assert all(cell.valid for cell in cells)
    wanted = [cell for cell in cells if cell.processes in set(processes)]
    return [dataclasses.replace(cell, seed=SEEDS.get(seed_key(cell), cell.seed)) for cell in wanted]


def complaints(cell: Cell, found: dict[str, Any]) -> list[str]:
    """What is out of tolerance in what equivalence.py found for a cell."""
    tolerance = TOLERANCES[cell.precision]
    wrong = [
        f"{cell.name}: {kind} {found[kind]:.1e} ({found['where'].get(kind, '')})"
        for kind in KINDS
        if not found[kind] < tolerance
    ]
    if cell.precision == "float32" and not found["margin"] > SMALLEST_MARGIN:
        wrong.append(f"{cell.name}: a slot was chosen by {found['margin']:.1e} only")
    return wrong


def pairwise_cover(cells: list[Cell]) -> list[Cell]:
    """Few of the cells, in which every pair of values of two fields that some cell has is had by one: greedily."""
    names = [field.name for field in dataclasses.fields(Cell) if field.name != "seed"]

    def pairs(cell: Cell) -> set[tuple[Any, ...]]:
        values = [(name, getattr(cell, name)) for name in names]
        return set(itertools.combinations(values, 2))

    missing = set().union(*(pairs(cell) for cell in cells))
    chosen: list[Cell] = []
    while missing:
        best = max(cells, key=lambda cell: len(pairs(cell) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen
