"""Megatron's process groups as DeepSpeed asks for them."""

from __future__ import annotations

import torch.distributed as dist


class ParallelGroups:
    """What DeepSpeed calls an mpu: ranks, sizes and groups of data, tensor and pipeline parallelism.

    Made of the groups that Megatron has when it is made: it stays what it is when others are built. "Model parallel"
    are the ranks that hold one model together, over which DeepSpeed adds up gradient norms.
    """

    def __init__(self) -> None:
        from megatron.core import parallel_state

        self._data: dist.ProcessGroup = parallel_state.get_data_parallel_group()
        self._tensor: dist.ProcessGroup = parallel_state.get_tensor_model_parallel_group()
        self._pipeline: dist.ProcessGroup = parallel_state.get_pipeline_model_parallel_group()
        self._model: dist.ProcessGroup = parallel_state.get_model_parallel_group()

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Ranks with the same part of the model, one of each replica."""
        return self._data

    def get_data_parallel_rank(self) -> int:
        """This rank's replica."""
        return dist.get_rank(self._data)

    def get_data_parallel_world_size(self) -> int:
        """Number of replicas."""
        return dist.get_world_size(self._data)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Ranks of this replica."""
        return self._model

    def get_model_parallel_rank(self) -> int:
        """This rank among those of its replica."""
        return dist.get_rank(self._model)

    def get_model_parallel_world_size(self) -> int:
        """Ranks of a replica."""
        return dist.get_world_size(self._model)

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that split the layers of this rank's stage."""
        return self._tensor

    def get_tensor_model_parallel_rank(self) -> int:
        """This rank among them."""
        return dist.get_rank(self._tensor)

    def get_tensor_model_parallel_world_size(self) -> int:
        """Their number."""
        return dist.get_world_size(self._tensor)

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        """Ranks of this replica with the same part of each stage."""
        return self._pipeline

    def get_pipeline_model_parallel_rank(self) -> int:
        """This rank's stage."""
        return dist.get_rank(self._pipeline)

    def get_pipeline_model_parallel_world_size(self) -> int:
        """Number of stages."""
        return dist.get_world_size(self._pipeline)
