"""Weights and optimizer state in a DeepSpeed engine, as runs of whole parameters: the same view of every ZeRO stage.

A rank has fp32 weights and moments of some elements of each of its parameters: of all of them without ZeRO, of a
contiguous run where replicas divide them (the flat partitions of stages 1 to 3). Each run is a view, to be saved as it
is and loaded in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = {"first_moment": "exp_avg", "second_moment": "exp_avg_sq"}
"""Our names of AdamW's moments, and torch's."""


@dataclass(frozen=True)
class Run:
    """Contiguous elements of a flattened parameter, of which this rank has the optimizer's state."""

    start: int
    weight: Tensor
    """The elements in fp32 (fp64 in comparisons), 1-D."""
    moments: dict[str, Tensor]
    """The same of each of MOMENTS."""


class EngineState:
    """What an engine's optimizer holds.

    Args:
        engine: DeepSpeed's, with torch's AdamW inside and without offloading
        model: its module
        name_of: from the module's names of parameters to those in a checkpoint
    """

    def __init__(self, engine: Any, model: nn.Module, name_of: Callable[[str], str] = str) -> None:
        self._engine = engine
        self._optimizer = engine.optimizer
        self._parameters = {name_of(name): p for name, p in model.named_parameters() if p.requires_grad}
        by_stage: list[Callable[[nn.Parameter], Run | None]] = [
            *(self._run_of_whole, self._run_of_flat_partition, self._run_of_flat_partition, self._run_of_stage_3)
        ]
        self._run_of = by_stage[engine.zero_optimization_stage()]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """By name in a checkpoint."""
        return self._parameters

    @property
    def is_replicated(self) -> bool:
        """Whether every replica has all of this (without ZeRO)."""
        return self._run_of == self._run_of_whole

    @property
    def divides_weights(self) -> bool:
        """Whether no rank keeps whole weights between uses (ZeRO-3)."""
        return self._run_of == self._run_of_stage_3

    def runs(self) -> Iterator[tuple[str, nn.Parameter, Run]]:
        """(name, parameter, run) of every parameter of which this rank has some elements."""
        for name, parameter in self._parameters.items():
            run = self._run_of(parameter)
            if run is not None and run.weight.numel():
                yield name, parameter, run

    def shape_of(self, parameter: nn.Parameter) -> torch.Size:
        """Shape of this tensor-parallel rank's part; ZeRO-3 leaves nothing of it in the parameter itself."""
        return torch.Size(getattr(parameter, "ds_shape", parameter.shape))

    # -- steps of the optimizer -----------------------------------------------------------------------------------

    def steps(self) -> int:
        """Steps that AdamW has made, which its corrections of the moments follow; 0 where this rank has no state.

        Raises RuntimeError when parameters differ: a checkpoint of any layout has one number for all.
        """
        found = {int(self._state_of(flat)["step"]) for flat in self._flat_parameters()} - {0}
        if len(found) > 1:
            raise RuntimeError(f"parameters have made different numbers of optimizer steps: {sorted(found)}")
        return max(found, default=0)

    def set_steps(self, steps: int) -> None:
        """Set what `steps` returns."""
        for flat in self._flat_parameters():
            self._state_of(flat)["step"] = torch.tensor(float(steps), dtype=torch.float32)

    def _flat_parameters(self) -> list[Tensor]:
        """What torch's optimizer takes for parameters."""
        if self.divides_weights:
            return list(self._optimizer.fp32_partitioned_groups_flat)
        inner = getattr(self._optimizer, "optimizer", self._optimizer)
        return [parameter for group in inner.param_groups for parameter in group["params"]]

    def _state_of(self, flat: Tensor) -> dict[str, Any]:
        """AdamW's state; what it would make at its first step if it has made none."""
        state: dict[str, Any] = getattr(self._optimizer, "optimizer", self._optimizer).state[flat]
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            state.update({theirs: torch.zeros_like(flat.detach()) for theirs in MOMENTS.values()})
        return state

    # -- runs by stage --------------------------------------------------------------------------------------------

    def _run_of_whole(self, parameter: nn.Parameter) -> Run:
        state = self._state_of(parameter)
        moments = {ours: state[theirs].view(-1) for ours, theirs in MOMENTS.items()}
        return Run(0, parameter.detach().view(-1), moments)

    def _run_of_flat_partition(self, parameter: nn.Parameter) -> Run | None:
        """ZeRO-1 and 2: DeepSpeed keeps with each parameter where its elements are in this rank's flat partition."""
        mapping: Any = getattr(parameter, "_hp_mapping", None)
        if mapping is None:  # all on other ranks
            return None
        flat = self._optimizer.optimizer.param_groups[mapping.param_group_index]["params"][0]
        state, place = self._state_of(flat), mapping.hp_fragment_address
        moments = {ours: state[theirs].detach().narrow(0, place.start, place.numel) for ours, theirs in MOMENTS.items()}
        return Run(mapping.lp_fragment_address.start, mapping.hp_fragment.detach(), moments)

    def _run_of_stage_3(self, parameter: Any) -> Run:
        """ZeRO-3: of each parameter its rank-th part; the last ones are padded."""
        optimizer = self._optimizer
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        flat = optimizer.fp32_partitioned_groups_flat[group]
        start = size * torch.distributed.get_rank(optimizer.dp_process_group)
        there = max(0, min(size, parameter.ds_numel - start))
        state = self._state_of(flat)
        moments = {ours: state[theirs].detach().narrow(0, offset, there) for ours, theirs in MOMENTS.items()}
        return Run(start, flat.detach().narrow(0, offset, there), moments)

    # -- after loading --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def spread_weights(self) -> None:
        """ZeRO-3: bring the weights that the model computes with to the fp32 ones; all ranks call this together."""
        if not self.divides_weights:
            return
        optimizer = self._optimizer
        optimizer.checkpoint_event_prologue()
        for sub_group, fp32 in enumerate(optimizer.fp32_partitioned_groups_flat):
            flat = optimizer.fp16_partitioned_groups_flat[sub_group]
            flat.data.copy_(fp32.data)
            parts = optimizer.fp16_partitioned_groups[sub_group]
            for part, values in zip(parts, optimizer.unflatten(flat, parts), strict=True):
                part.data = values.data
        optimizer.checkpoint_event_epilogue()
