"""Starting and ending the process group, and what the ranks agree on."""

from __future__ import annotations

import atexit
import gc
import importlib
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed

from megatron_fwpkm.errors import RankFailedError, SharedUserError, UserError
from megatron_fwpkm.files import is_no_space
from megatron_fwpkm.memory.placement import ALONE, Placement
from megatron_fwpkm.parallel.settings import ParallelConfig
from megatron_fwpkm.phase import PHASE

RANK_ORDER = "tp-cp-ep-pp-dp"
"""Megatron's axis order that equals DeepSpeed's ["data", "pipe", "model"]: a replica's ranks are consecutive."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Topology:
    """This process among all processes."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    replica: int
    """Index of this rank's model copy, 0..replicas-1."""
    replicas: int
    """Number of model copies (data-parallel size)."""
    tensor_rank: int = 0
    """This rank among those that the layers are split over."""
    tensor_ranks: int = 1
    stage: int = 0
    """This rank's pipeline stage."""
    stages: int = 1
    placement: Placement = ALONE
    """How memories are spread over ranks."""

    @property
    def leads_replica(self) -> bool:
        """Whether this is the first rank of its replica, whose batches count for all of them."""
        return self.tensor_rank == 0 and self.stage == 0

    @property
    def reports_loss(self) -> bool:
        """Whether this is the rank of its replica whose losses count: the first of the last stage, which has them."""
        return self.tensor_rank == 0 and self.stage == self.stages - 1

    @property
    def is_leader(self) -> bool:
        """Whether this is global rank 0, which writes logs and shows progress."""
        return self.rank == 0


def started_by_launcher() -> bool:
    """Whether torchrun or the deepspeed launcher started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def set_threads(local_world_size: int) -> None:
    """Share this machine's cores among its processes: several threads per core slow each other down."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, cores // local_world_size))


def check_layout(layout: ParallelConfig, world_size: int) -> None:
    """Raise SharedUserError, naming the numbers, unless `world_size` processes can be laid out so."""
    per_replica = layout.tensor * layout.pipeline
    if world_size % per_replica:
        raise SharedUserError(
            f"{world_size} processes can't be divided into replicas of parallel.tensor={layout.tensor} x "
            f"parallel.pipeline={layout.pipeline} = {per_replica}; start a multiple of {per_replica}"
        )
    replicas, together = world_size // per_replica, layout.memory.group_replicas
    if replicas % together:
        raise SharedUserError(
            f"{replicas} replicas ({world_size} processes in groups of {per_replica}) can't be divided into memory "
            f"groups of {together}, as parallel.memory.group={layout.memory.group} asks; start a multiple of "
            f"{together * per_replica} processes, or set another group"
        )
    if layout.memory.replicas == "synced" and layout.memory.group != "tp" and together != replicas:
        raise SharedUserError(
            f"parallel.memory.replicas=synced has all {replicas} replicas write one memory and "
            f"parallel.memory.group={layout.memory.group} only {together}; set parallel.memory.group=tp_dp_{replicas}, "
            "or replicas=independent"
        )


def initialize(layout: ParallelConfig) -> Topology:
    """Join the process group named by the launcher's environment and build Megatron's groups on it.

    A rank that waits for another longer than `layout.timeout_seconds` fails instead of hanging. Raises
    SharedUserError if the number of processes doesn't fit the layout.
    """
    world_size = int(os.environ["WORLD_SIZE"])
    check_layout(layout, world_size)
    # The deepspeed launcher has another name for it; streaming, too, looks for this one.
    local_world_size = int(os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
    set_threads(local_world_size)
    deepspeed, _ = import_engine()
    backend = "gloo"
    if torch.cuda.is_available():
        if local_world_size > torch.cuda.device_count():
            raise SharedUserError(
                f"{local_world_size} processes on a machine with {torch.cuda.device_count()} GPUs; start one for each "
                f"GPU: parallel.processes={torch.cuda.device_count()}"
            )
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "nccl"
    if backend == "gloo":
        # DeepSpeed compiles a shared-memory operator at first use: over a minute, for nothing that is used here.
        communication: Any = importlib.import_module("deepspeed.comm.torch")
        communication.build_shm_op = lambda: None
    timeout = timedelta(seconds=layout.timeout_seconds)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)
    return build_groups(layout)


def build_groups(layout: ParallelConfig) -> Topology:
    """Megatron's groups for a layout of the processes that have joined; those of an earlier layout are given up.

    All ranks call this together. Raises SharedUserError if the number of processes doesn't fit.
    """
    from megatron.core import parallel_state

    world_size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    check_layout(layout, world_size)
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        order=RANK_ORDER,
        distributed_timeout_minutes=layout.timeout_seconds / 60,  # type: ignore[arg-type]  # fractions will do
        create_gloo_process_groups=False,
    )
    return Topology(
        rank=rank,
        world_size=world_size,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        replica=parallel_state.get_data_parallel_rank(),
        replicas=parallel_state.get_data_parallel_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_ranks=layout.tensor,
        stage=parallel_state.get_pipeline_model_parallel_rank(),
        stages=layout.pipeline,
        placement=_placement(layout, parallel_state.get_tensor_model_parallel_group()),
    )


def _placement(layout: ParallelConfig, tensor_group: torch.distributed.ProcessGroup) -> Placement:
    """The groups of this rank's memories. A replica's ranks are consecutive, stage by stage (RANK_ORDER)."""
    world_size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    per_replica = layout.tensor * layout.pipeline
    replicas = world_size // per_replica
    together = replicas if layout.memory.replicas == "synced" else layout.memory.group_replicas
    memory_group = tensor_group if layout.tensor > 1 else None
    if together > 1:
        timeout = timedelta(seconds=layout.timeout_seconds)
        for first_replica in range(0, replicas, together):
            for stage in range(layout.pipeline):
                members = [
                    replica * per_replica + stage * layout.tensor + tensor_rank
                    for replica in range(first_replica, first_replica + together)
                    for tensor_rank in range(layout.tensor)
                ]
                group = torch.distributed.new_group(members, timeout=timeout)  # called on all ranks alike
                if rank in members:
                    memory_group = group
    return Placement(
        tensor_group=tensor_group if layout.tensor > 1 else None,
        memory_group=memory_group,
        sequence_parallel=layout.sequence_parallel and layout.tensor > 1,
        sharding=layout.memory.sharding,
        routing=layout.memory.routing,
    )


def import_engine() -> tuple[Any, Any]:
    """DeepSpeed and Megatron's parallel_state, without their remarks on GPU libraries that a CPU machine lacks."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # Megatron compiles functions for GPUs as it is imported; without one the compiler's own import, of seconds on
        # a small machine, serves nothing.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
        # Where Megatron gathers and scatters tokens it makes its buffers on this device, without asking further.
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
    # Communication and computation then start in the order in which Megatron's layers issue them.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    import deepspeed
    from megatron.core import parallel_state

    # At its end the interpreter looks through every object for garbage: for seconds, with these libraries loaded.
    atexit.register(gc.freeze)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed, parallel_state


def shut_down() -> None:
    """Leave the process group, if in one."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def end_groups() -> None:
    """End all process groups but that of all ranks; all ranks call this together, and have dropped what used them.

    For programs that build one layout after another: every group has threads of its own, and those of hundreds of
    groups would take more time than the work.
    """
    from deepspeed.utils import groups
    from megatron.core import parallel_state
    from torch.distributed import distributed_c10d

    gc.collect()  # engines are in cycles
    torch.distributed.barrier()
    parallel_state.destroy_model_parallel()
    groups.mpu = groups._WORLD_GROUP = None
    for group in list(distributed_c10d._world.pg_map):
        if group is not torch.distributed.group.WORLD:
            torch.distributed.destroy_process_group(group)
    gc.collect()


def agree_on_errors(
    action: Callable[[], Result], what: str, group: torch.distributed.ProcessGroup | None = None
) -> Result:
    """Run `action` on every rank; if it fails on any, raise on all, so that none waits for one that has gone.

    `group` is one of all ranks, where the default one may be in use by another thread.
    A UserError is raised as SharedUserError with its message, a full disk as one that says so, anything else as
    RankFailedError with the message of the first rank that failed. `what` is a phrase like "writing a checkpoint".
    """
    result: Result | None = None
    failure: tuple[bool, str] | None = None
    cause: Exception | None = None
    with PHASE.during(what):
        try:
            result = action()
        except Exception as error:
            cause = error
            failure = _describe_failure(error, what)
        failures: list[tuple[bool, str] | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(failures, failure, group=group)
    for rank, found in enumerate(failures):
        if found is not None:
            by_user, message = found
            raise (SharedUserError(message) if by_user else RankFailedError(rank, what, message)) from cause
    return result  # type: ignore[return-value]


def _describe_failure(error: Exception, what: str) -> tuple[bool, str]:
    """Whether the user can mend it, and what to say."""
    if isinstance(error, UserError):
        return True, str(error)
    if is_no_space(error):
        where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        return True, (
            f"no space left on the disk while {what}{where}; free some and start the same command again: checkpoints "
            f"are whole or not there, and training goes on from the newest"
        )
    return False, f"{type(error).__name__}: {error}"


def on_leader(action: Callable[[], Result], what: str, group: torch.distributed.ProcessGroup | None = None) -> Result:
    """Run `action` on rank 0 alone; every rank gets its result, or raises as agree_on_errors() does if it failed."""
    shared = [agree_on_errors(lambda: action() if torch.distributed.get_rank() == 0 else None, what, group)]
    torch.distributed.broadcast_object_list(shared, src=0, group=group)
    return shared[0]  # type: ignore[return-value]


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all ranks, in place; the same bits on every rank."""
    torch.distributed.all_reduce(values)
    return values


def largest_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The largest of all ranks' numbers, each in its place, in place."""
    torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
    return values
