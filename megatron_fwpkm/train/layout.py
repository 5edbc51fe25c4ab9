"""Whether a job fits the number of its processes, which is known when it starts."""

from __future__ import annotations

from megatron_fwpkm.config import TrainConfig
from megatron_fwpkm.config.schema import check_evaluation, check_memories
from megatron_fwpkm.errors import SharedUserError
from megatron_fwpkm.parallel.topology import check_layout


def check_processes(config: TrainConfig, processes: int) -> None:
    """Raise SharedUserError, naming the numbers, unless the job can be laid out over so many processes."""
    layout = config.parallel
    check_layout(layout, processes)
    replicas = processes // (layout.tensor * layout.pipeline)
    try:
        if layout.memory.replicas == "synced":  # over all replicas, however many they are
            check_memories(config, replicas)
        check_evaluation(config, replicas)
    except ValueError as error:
        raise SharedUserError(f"{error} ({processes} processes)") from error
