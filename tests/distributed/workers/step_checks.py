"""Checks on the parts of a job that need several processes; prints what it found as JSON on rank 0."""

from __future__ import annotations

import json
import math
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from megatron_fwpkm.checkpoint import store as stores
from megatron_fwpkm.checkpoint.folder import newest_whole
from megatron_fwpkm.checkpoint.pieces import Pieces, Staging
from megatron_fwpkm.checkpoint.store import CheckpointStore, JobState, group_for_files
from megatron_fwpkm.checkpoint.tensors import SavedTensors
from megatron_fwpkm.config import load_train_config
from megatron_fwpkm.data.corpus import prepare_corpus
from megatron_fwpkm.data.streaming import TokenLoader
from megatron_fwpkm.data.token_stream import read_stream
from megatron_fwpkm.errors import RankFailedError
from megatron_fwpkm.evaluate.perplexity import held_out_loss
from megatron_fwpkm.parallel import topology
from megatron_fwpkm.parallel.topology import sum_over_ranks
from megatron_fwpkm.train import job as jobs
from megatron_fwpkm.train import joining
from megatron_fwpkm.train.job import checkpoint_parts
from megatron_fwpkm.train.job_data import open_data
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


def make_stepper(job: Job) -> Stepper:
    return Stepper(
        job.engine_bundle,
        job.model,
        job.loader,
        training=job.config.training,
        seed=job.config.seed,
        topology=job.topology,
    )


def check_non_finite(job: Job, poison: str) -> dict[str, object]:
    """One rank's loss or gradient is NaN in one step: no rank's weights or memories may change in it."""
    stepper = make_stepper(job)
    first = stepper.run(1, 1e-2, lambda: False)
    slow, fast = slow_weights(job), fast_weights(job)
    handle = None
    if job.topology.rank == 1:
        if poison == "loss":
            mlp = job.model.get_submodule("blocks.0.mlp")
            handle = mlp.register_forward_hook(lambda module, inputs, output: output * math.nan)
        else:
            weight = job.model.get_parameter("blocks.0.mlp.down.weight")
            handle = weight.register_hook(lambda gradient: gradient * math.inf)
    bad = stepper.run(2, 1e-2, lambda: job.topology.rank == 1)
    if handle is not None:
        handle.remove()
    unchanged = same(slow, slow_weights(job)) and same(fast, fast_weights(job))
    good = stepper.run(3, 1e-2, lambda: False)
    return {
        "applied": [first.applied, bad.applied, good.applied],
        "stop": [first.stop_requested, bad.stop_requested, good.stop_requested],
        "unchanged": unchanged,
        "good": math.isfinite(good.loss) and math.isfinite(good.gradient_norm),
        "changed_later": not same(slow, slow_weights(job)) and not same(fast, fast_weights(job)),
    }


def check_evaluation(job: Job) -> dict[str, object]:
    """Measuring twice gives the same, and changes nothing."""
    make_stepper(job).run(1, 1e-2, lambda: False)
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


def check_statistics(job: Job) -> dict[str, object]:
    """Loss, numbers and histograms are means over ranks and microbatches; the same on all ranks."""
    (_, layer), *_ = job.model.memory_layers()
    seen: list[dict[str, torch.Tensor]] = []
    losses: list[float] = []
    layer.register_forward_hook(lambda *_: seen.append(layer.statistics()))
    job.model.register_forward_hook(lambda module, inputs, loss_BT: losses.append(float(loss_BT.detach().mean())))
    result = make_stepper(job).run(1, 1e-2, lambda: False)
    shared: list[Any] = [None] * job.topology.world_size
    own = [{name: value.float().flatten().tolist() for name, value in memory.items()} for memory in seen]
    torch.distributed.all_gather_object(shared, (own, losses, result.memory, result.histograms, result.loss))
    microbatches = [memory for memories, *_ in shared for memory in memories]
    reported = {**{name: [value] for name, value in result.memory.items()}, **result.histograms}
    expected = {
        f"memory/block_1/{name}": torch.tensor([memory[name] for memory in microbatches]).mean(0)
        for name in microbatches[0]
    }
    mean_loss = torch.tensor([loss for _, losses, *_ in shared for loss in losses]).mean()
    return {
        "microbatches": len(microbatches),
        "names": sorted(name.rpartition("/")[2] for name in result.histograms),
        "sizes": sorted(len(values) for values in result.histograms.values()),
        "tags": set(reported) == set(expected) and len(result.memory) > 5,
        "means": all(torch.allclose(torch.tensor(reported[n]), v, rtol=1e-5) for n, v in expected.items()),
        "loss": abs(result.loss - float(mean_loss)) < 1e-5,
        "labels": result.labels == result.tokens == job.topology.world_size * 2 * 2 * 64,
        "agreed": all(others[2:] == shared[0][2:] for others in shared),
    }


def check_shares(job: Job) -> dict[str, object]:
    """In one epoch every sequence is read by one rank, but for those that fill no batch."""
    assert isinstance(job.loader, TokenLoader)
    sequences = job.loader.sequences
    batches = sequences // job.topology.world_size // 2
    own = [tuple(row) for _ in range(batches) for row in next(job.loader).tokens_BT.tolist()]
    shares: list[list[tuple[int, ...]]] = [[] for _ in range(job.topology.world_size)]
    torch.distributed.all_gather_object(shares, own)
    rows = [row for share in shares for row in share]
    corpus, _ = prepare_corpus(job.config.data, job.config.seed)
    stream = read_stream(corpus, "train", 0, sequences * 64).tokens.reshape(sequences, 64).tolist()
    surplus = Counter(rows) - Counter(map(tuple, stream))
    return {"read": len(rows), "surplus": surplus.total(), "sequences": sequences}


class CountingPart:
    """State of a part of its own."""

    def __init__(self, value: int, broken: bool = False) -> None:
        self.value = value
        self.broken = broken

    def pieces(self, staging: Staging) -> dict[str, Pieces]:
        if self.broken:
            raise OSError("can't read the device")
        return {f"counter/{torch.distributed.get_rank()}": Pieces.whole(torch.tensor(self.value))}

    def load(self, source: SavedTensors) -> list[str]:
        self.value = int(source.whole(f"counter/{torch.distributed.get_rank()}"))
        return [f"counted to {self.value}"]

    def finish_loading(self) -> None:
        self.finished = True


def check_parts(job: Job) -> dict[str, object]:
    """Further owners of state save and load themselves; one that fails on one rank leaves nothing half."""
    rank, folder = job.topology.rank, Path(job.config.run_directory) / "checkpoints"
    counter = CountingPart(10 + rank)
    parts = {**checkpoint_parts(job.engine_bundle, job.model, job.topology), "counter": counter}
    store = CheckpointStore(folder, job.topology, parts, asynchronous=True)
    state = JobState(1, 512, 0, None, [], job.loader.state_dict(), job.corpus, job.layout)
    store.save(state)
    store.finish()
    own = {f"{rank}": Pieces.whole(torch.zeros(1000 * (rank + 1)))}  # 4 and 8 kB
    needed = stores._needed_bytes(own, group_for_files()) - (1 << 20) - 2 * stores._ENTRY_BYTES
    drawn = [torch.rand(3).tolist(), random.random()]
    counter.value, counter.broken = 0, rank == 1
    failed = ""
    try:
        store.save(replace(state, step=2))
    except RankFailedError as error:
        failed = f"{error.rank}: {error.reason}"
    torch.distributed.barrier()
    names = sorted(path.name for path in folder.iterdir())
    said: list[str] = []
    source = newest_whole(folder, job.topology, said.append)
    found = source is not None and store.load(source, said.append)
    return {
        "needed": everywhere(needed == 12000),
        "failed": failed,
        "names": names,
        "said": said,
        "restored": everywhere(counter.value == 10 + rank and counter.finished),
        "same": found == state,
        "generators": everywhere([torch.rand(3).tolist(), random.random()] == drawn),
    }


CHECKS: dict[str, Callable[[Job], dict[str, object]]] = {
    "non_finite_loss": lambda job: check_non_finite(job, "loss"),
    "non_finite_gradient": lambda job: check_non_finite(job, "gradient"),
    "evaluation": check_evaluation,
    "statistics": check_statistics,
    "shares": check_shares,
    "parts": check_parts,
}
"""Each gets a job that has made no step."""


def main() -> None:
    config = load_train_config(Path(sys.argv[1]))
    ranks = topology.initialize(config.parallel)
    found = {}
    with joining._shared_scratch(ranks) as scratch:
        for name, check in CHECKS.items():
            (scratch / name).mkdir(exist_ok=True)  # the other rank makes it too
            data = open_data(config, ranks, scratch / name, lambda line: None)
            files = group_for_files()
            job = jobs._build(config, ranks, data, jobs._vocabulary(config, data, None, files), files)
            job.model.train()
            found[name] = check(job)
    topology.shut_down()
    if ranks.is_leader:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
