"""Checks on the parts of a job that need several processes; prints what it found as JSON on rank 0."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
import torch.distributed

from megatron_fwpkm.config import load_train_config
from megatron_fwpkm.evaluate.perplexity import held_out_loss
from megatron_fwpkm.parallel import topology
from megatron_fwpkm.parallel.topology import sum_over_ranks
from megatron_fwpkm.train import job as jobs
from megatron_fwpkm.train.loop import Job
from megatron_fwpkm.train.step import Stepper


def slow_weights(job: Job) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in job.model.parameters()]


def fast_weights(job: Job) -> list[torch.Tensor]:
    return [tensor.clone() for _, state in job.model.fast_states() for tensor in (state.keys_H2nd, state.values_ND())]


def everywhere(value: bool) -> bool:
    """Whether it is true on all ranks."""
    return sum_over_ranks(torch.tensor(float(value))).item() == torch.distributed.get_world_size()


def same(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return everywhere(all(torch.equal(one, other) for one, other in zip(before, after, strict=True)))


def check_non_finite(job: Job, poison: str) -> dict[str, object]:
    """One rank's loss or gradient is NaN in one step: no rank's weights or memories may change in it."""
    stepper = Stepper(job.engine, job.model, job.loader, 2, job.topology.world_size)
    first = stepper.run(stop_requested=False)
    slow, fast = slow_weights(job), fast_weights(job)
    handle = None
    if job.topology.rank == 1:
        if poison == "loss":
            mlp = job.model.get_submodule("blocks.0.mlp")
            handle = mlp.register_forward_hook(lambda module, inputs, output: output * math.nan)
        else:
            weight = job.model.get_parameter("blocks.0.mlp.down.weight")
            handle = weight.register_hook(lambda gradient: gradient * math.inf)
    bad = stepper.run(stop_requested=job.topology.rank == 1)
    if handle is not None:
        handle.remove()
    unchanged = same(slow, slow_weights(job)) and same(fast, fast_weights(job))
    good = stepper.run(stop_requested=False)
    return {
        "applied": [first.applied, bad.applied, good.applied],
        "stop": [first.stop_requested, bad.stop_requested, good.stop_requested],
        "unchanged": unchanged,
        "good": math.isfinite(good.loss) and math.isfinite(good.gradient_norm),
        "changed_later": not same(slow, slow_weights(job)) and not same(fast, fast_weights(job)),
    }


def check_evaluation(job: Job) -> dict[str, object]:
    """Measuring twice gives the same, and changes nothing."""
    Stepper(job.engine, job.model, job.loader, 2, job.topology.world_size).run(stop_requested=False)
    slow, fast = slow_weights(job), fast_weights(job)
    first, second = held_out_loss(job.model, job.held_out), held_out_loss(job.model, job.held_out)
    return {
        "repeatable": first == second,
        "unchanged": same(slow, slow_weights(job)) and same(fast, fast_weights(job)),
        "reads_matter": first.with_reads != first.without_reads,
        "tokens": first.tokens,
        "training": job.model.training,
        "reads_on": all(layer.memory_reads for _, layer in job.model.memory_layers()),
    }


def check_shares(job: Job) -> dict[str, object]:
    """In one epoch every sequence is read by one rank, but for those that fill no batch."""
    sequences = job.loader._dataset.size
    batches = sequences // job.topology.world_size // 2
    own = [tuple(row) for _ in range(batches) for row in next(job.loader).tokens_BT.tolist()]
    shares: list[list[tuple[int, ...]]] = [[] for _ in range(job.topology.world_size)]
    torch.distributed.all_gather_object(shares, own)
    rows = [row for share in shares for row in share]
    return {"read": len(rows), "distinct": len(set(rows)), "sequences": sequences}


def main() -> None:
    config = load_train_config(Path(sys.argv[1]))
    ranks = topology.initialize(config.parallel.tensor, config.parallel.timeout_seconds)
    with jobs._shared_scratch(ranks) as scratch:
        corpus, manifest = jobs._prepare_in_turns(config, ranks, lambda line: None)
        job = jobs._build(config, ranks, corpus, manifest, scratch)
        job.model.train()
        checks = {
            "non_finite": lambda: check_non_finite(job, sys.argv[3]),
            "evaluation": lambda: check_evaluation(job),
            "shares": lambda: check_shares(job),
        }
        found = checks[sys.argv[2]]()
    topology.shut_down()
    if ranks.is_leader:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
