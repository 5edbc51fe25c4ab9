"""The cells of the equivalence matrix: layouts, and what is trained in them."""

from __future__ import annotations

import dataclasses
from typing import Literal


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
    reset: Literal["carry", "per_step", "per_sequence"] = "carry"
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
            or (self.memory_replicas == "synced" and self.replicas == 1)
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
