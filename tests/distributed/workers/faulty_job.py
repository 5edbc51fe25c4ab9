"""A training job in which something breaks: starts itself like launch/train.py, with a fault built in on the way.

faulty_job.py <configuration> <fault> [overrides]

A fault may be "die@<phase>" or "raise@<phase>": rank 1 kills itself or raises where it joins the first exchange of that
phase, "in the forward pass of step 3 (memory of block 1)".
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from megatron_fwpkm.checkpoint import store
from megatron_fwpkm.config import load_train_config
from megatron_fwpkm.errors import JobFailedError, SharedUserError, UserError
from megatron_fwpkm.parallel.topology import started_by_launcher
from megatron_fwpkm.phase import PHASE
from megatron_fwpkm.train import loop, peers
from megatron_fwpkm.train.job import run_job
from megatron_fwpkm.train.launcher import report_user_error, start_processes
from megatron_fwpkm.train.step import Stepper


def break_step(fault: str, stages: int) -> None:
    """Rank 1 raises in its third step, or rank 0 never ends it."""
    owner: Any = Stepper
    name = "_microbatch"
    if stages > 1:
        from megatron_fwpkm.model.pipeline import PipelineDecoder

        owner, name = PipelineDecoder, "forward"
    microbatch = getattr(owner, name)
    calls = []

    def broken(self: Any, *arguments: Any) -> Any:
        import torch.distributed

        calls.append(1)
        if len(calls) == 5 and fault == "raise" and torch.distributed.get_rank() == 1:
            raise ValueError("built-in fault")
        if len(calls) == 5 and fault == "hang" and torch.distributed.get_rank() == 0:
            time.sleep(600)
        return microbatch(self, *arguments)

    setattr(owner, name, broken)


EXCHANGES = (
    *("all_reduce", "all_to_all_single", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "reduce"),
    *("broadcast", "send", "recv", "isend", "irecv", "all_gather_object"),
)


def break_exchange(fault: str, phase: str) -> None:
    """Rank 1 dies or raises as it joins an exchange of a phase, in which rank 0 then is."""
    import torch.distributed
    from torch.distributed.distributed_c10d import _get_default_store

    there = f"rank 0 was {phase}"

    def broken(exchange: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            if PHASE.of_thread() != phase:
                return exchange(*arguments, **options)
            if torch.distributed.get_rank() == 0:
                _get_default_store().set(there, "")
            elif torch.distributed.get_rank() == 1:
                _get_default_store().wait([there])
                if fault == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ValueError("built-in fault")
            return exchange(*arguments, **options)

        return run

    for name in EXCHANGES:
        setattr(torch.distributed, name, broken(getattr(torch.distributed, name)))


def flip_a_bit() -> None:
    """One bit of a sub-key changes on rank 1 before the keys are compared after the second step."""
    check_keys = loop.check_keys
    calls = []

    def check(model: Any, ranks: Any) -> None:
        import torch

        calls.append(1)
        if len(calls) == 2 and ranks.rank == 1:
            *_, (_, state) = model.fast_states()
            key_d = state.keys_H2nd[0, 0, 0]
            key_d[1] = torch.nextafter(key_d[1], torch.tensor(1e9))
        check_keys(model, ranks)

    loop.check_keys = check  # type: ignore[assignment]


def main() -> int:
    fault = sys.argv[2]
    config = load_train_config(Path(sys.argv[1]), sys.argv[3:])
    if not started_by_launcher():
        try:
            return start_processes(sys.argv, config.parallel.processes, Path(config.run_directory))
        except (UserError, JobFailedError) as error:
            print(f"error: {error}", flush=True)
            return 2 if isinstance(error, UserError) else 1
    if fault == "no-estimate":  # as if another program filled the disk after it was looked at
        store._needed_bytes = lambda pieces, group: 0  # type: ignore[assignment]
    elif fault == "flip":
        flip_a_bit()
    elif "@" in fault:
        break_exchange(*fault.split("@"))
    else:
        break_step(fault, config.parallel.pipeline)
    if fault == "hang":
        peers.PeerWatch.__init__.__kwdefaults__ = {"grace_seconds": 2.0}
    try:
        run_job(config)
    except SharedUserError as error:
        return 0 if report_user_error(str(error)) else 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
