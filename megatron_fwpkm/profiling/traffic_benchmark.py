"""Benchmark of memories spread over ranks: bytes, messages and time of each way to exchange, in turns in one run.

For each number of ranks a job of as many processes is started on this machine; all ways to exchange work there in
turns, each on a state of its own. Times are wall-clock medians of the slowest rank over gloo: they show what the ways
cost on this machine, where links are memory copies and every message costs tens of microseconds. What faster machines
would take to send as much is a model (`traffic_model.modelled_seconds`), stated as such. Queries are as a trained
memory's: each near a pair of sub-keys, of which some are drawn far more often than others.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fwpkm.memory import FastState, MemoryConfig, addressing, fast_memory
from megatron_fwpkm.memory.chunk import chunk_bounds
from megatron_fwpkm.memory.groups import make_memory_group
from megatron_fwpkm.memory.placement import ALONE, Placement
from megatron_fwpkm.memory.sharding import Owners, column_share, token_share
from megatron_fwpkm.memory.traffic import Traffic
from megatron_fwpkm.profiling.row_shipping import RowShippingGroup, ShippedCall
from megatron_fwpkm.profiling.traffic_model import LINKS, Kind, modelled_seconds

KINDS: tuple[Kind, ...] = ("dynamic", "static", "columns", "rows")
NAMES = {"whole": "one rank", "dynamic": "slots", "static": "slots, static", "columns": "columns", "rows": "naive rows"}
IMBALANCE_RANKS = (2, 4, 8)


@dataclass(frozen=True)
class TrafficSettings:
    """What is measured: numbers of ranks, sub-keys n, tokens, chunk, width (k_dim = v_dim), topk, timed repeats."""

    ranks: tuple[int, ...]
    n: int
    tokens: int
    chunk: int
    width: int
    topk: int
    repeats: int

    def config(self) -> MemoryConfig:
        """The memory."""
        return MemoryConfig(n_subkeys=self.n, k_dim=self.width, v_dim=self.width, topk=self.topk, chunk_size=self.chunk)


@dataclass
class TrafficRow:
    """One way to exchange over some ranks, for one call; bytes and messages of all ranks, of the backward pass alone.

    Attributes:
        forward_s, total_s: medians over calls of the slowest rank's time
        lowest_s: the shortest of both passes, which other work on the machine disturbs least
        sent_bytes, messages: by phase, of all ranks
        most_bytes, most_messages: of the rank that sends most, in all phases
        load: reads of the owner that has most / mean
        distinct_ratio: distinct rows / reads, of all owners
    """

    kind: str
    ranks: int
    tokens: int
    forward_s: float
    total_s: float
    lowest_s: float
    sent_bytes: dict[str, int]
    messages: dict[str, int]
    most_bytes: int
    most_messages: int
    load: float
    distinct_ratio: float


def hot_queries(settings: TrafficSettings, keys_H2nd: Tensor, hot: tuple[bool, bool], seed: int = 1) -> Tensor:
    """[1, T, 1, k] queries near pairs of sub-keys; a half that is `hot` draws its i-th sub-key with weight 1 / i."""
    generator = torch.Generator().manual_seed(seed)
    halves = []
    for half in range(2):
        odds = 1 / torch.arange(1.0, settings.n + 1) if hot[half] else torch.ones(settings.n)
        chosen = torch.multinomial(odds, settings.tokens, replacement=True, generator=generator)
        place = torch.randperm(settings.n, generator=generator)[chosen]
        keys = keys_H2nd[0, half, place]
        halves.append(keys + 0.5 * keys.std() * torch.randn(keys.shape, generator=generator))
    return torch.cat(halves, 1).view(1, settings.tokens, 1, settings.width)


def owner_imbalance(settings: TrafficSettings) -> list[dict[str, Any]]:
    """Largest / mean reads of an owner, mean over chunks, of two ways to spread slots, for hot sub-keys of a half."""
    config = settings.config()
    state = FastState(config, seed=0)
    rows = []
    for name, hot in {"first": (True, False), "second": (False, True), "both": (True, True)}.items():
        query = hot_queries(settings, state.keys_H2nd, hot)
        slot_TP = addressing.address(addressing.split_queries(query), state.keys_MH2nd, config).slot_YP
        for ranks in IMBALANCE_RANKS:
            owner_TP = Owners(settings.n, ranks).locate(slot_TP)[0]
            bounds = chunk_bounds(settings.tokens, config)
            found = {
                way: statistics.mean(_imbalance(owner[start:end], ranks) for start, end in bounds)
                for way, owner in (("sum_of_subkeys", owner_TP), ("slot", slot_TP % ranks))
            }
            rows.append({"hot": name, "ranks": ranks, **found})
    return rows


def _imbalance(owner: Tensor, ranks: int) -> float:
    return float(torch.bincount(owner.flatten(), minlength=ranks).max()) * ranks / owner.numel()


class _Way:
    """One way to exchange: a memory, a group, and a call of both passes."""

    def __init__(self, kind: str, settings: TrafficSettings) -> None:
        self.kind, config = kind, settings.config()
        rank, ranks = dist.get_rank(), dist.get_world_size()
        by_columns = kind == "columns"
        sharding, routing = (
            ("columns", "dynamic") if by_columns else ("slots", "static" if kind == "static" else "dynamic")
        )
        world = dist.group.WORLD
        where = ALONE if kind == "whole" else Placement(world, world, sharding=sharding, routing=routing)  # type: ignore[arg-type]
        share = (column_share if by_columns else token_share)(settings.tokens, config, rank, ranks)
        self.state = FastState(config, seed=0, rank=rank, ranks=ranks, sharding=where.sharding)
        generator = torch.Generator().manual_seed(2)
        target, cotangent = (torch.randn(1, settings.tokens, settings.width, generator=generator) for _ in range(2))
        gate = torch.rand(1, settings.tokens, generator=generator)
        query = hot_queries(settings, self.state.keys_H2nd, (True, True))
        vectors = torch.arange(settings.tokens) if by_columns else share.own
        columns = self.state.columns
        parts = (query[:, share.own], target[:, share.targets, columns], gate[:, vectors])
        self.leaves = [part.contiguous().requires_grad_() for part in parts]
        self.cotangent = cotangent[:, vectors, columns].contiguous()
        self.spans = share.spans
        if kind == "rows":
            assert world is not None
            shipping = RowShippingGroup(world, Owners(settings.n, ranks), config.reads_per_token)
            self.traffic: Traffic | None = shipping.traffic
            self.shipped = ShippedCall(self.state, shipping, share.spans)
        else:
            self.group = make_memory_group(where, config)
            self.traffic = getattr(self.group, "traffic", None)

    def forward(self) -> Callable[[], Any]:
        """Run it; returns the backward pass."""
        query, target, gate = self.leaves
        if self.kind == "rows":
            self.shipped.call.decays.clear()
            self.shipped.forward(query.detach(), target.detach(), gate.detach(), None)
            return lambda: self.shipped.backward(self.cotangent)
        output = fast_memory(
            query, target, gate, None, self.state, self.state.config, group=self.group, spans=self.spans
        )
        return lambda: output.backward(self.cotangent)

    def timed(self) -> tuple[float, float]:
        """Seconds of the forward pass, and of both."""
        for leaf in self.leaves:
            leaf.grad = None
        dist.barrier()
        start = time.perf_counter()
        backward = self.forward()
        middle = time.perf_counter()
        backward()
        return middle - start, time.perf_counter() - start


def _over_ranks(values: list[float], how: dist.ReduceOp.RedOpType) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, how)
    return [float(value) for value in tensor]


def measure_ways(settings: TrafficSettings) -> list[TrafficRow]:
    """All ways over the ranks of this job, in turns; the same on every rank."""
    ways = [_Way(kind, settings) for kind in (KINDS if dist.get_world_size() > 1 else ("whole",))]
    traffic: list[Traffic] = []
    for way in ways:
        way.timed()  # the first call of each is its traffic, of equal states; and it warms up
        traffic.append(way.traffic.take() if way.traffic is not None else Traffic(1))
    times: dict[str, list[tuple[float, float]]] = {way.kind: [] for way in ways}
    for _ in range(settings.repeats):
        for way in ways:
            times[way.kind].append(way.timed())
    return [_row(way.kind, settings, sent, times[way.kind]) for way, sent in zip(ways, traffic, strict=True)]


def _row(kind: str, settings: TrafficSettings, sent: Traffic, times: list[tuple[float, float]]) -> TrafficRow:
    highest, added = dist.ReduceOp.MAX, dist.ReduceOp.SUM
    slowest = [_over_ranks(list(one), highest) for one in times]
    phases = ["plan", "read", "write", "keys", "backward"]
    sums = _over_ranks([float(sent.sent_bytes[p]) for p in phases] + [float(sent.messages[p]) for p in phases], added)
    total = [float(sent.sent_bytes.total()), float(sent.messages.total()), sent.load]
    most_bytes, most_messages, load = _over_ranks(total, highest)
    rows_here, reads_here = _over_ranks([float(sent.rows_here), float(sent.reads_here)], added)
    return TrafficRow(
        kind,
        dist.get_world_size(),
        settings.tokens,
        statistics.median(forward for forward, _ in slowest),
        statistics.median(both for _, both in slowest),
        min(both for _, both in slowest),
        {phase: int(value) for phase, value in zip(phases, sums[:5], strict=True)},
        {phase: int(value) for phase, value in zip(phases, sums[5:], strict=True)},
        int(most_bytes),
        int(most_messages),
        load,
        rows_here / max(reads_here, 1),
    )


def _in_job(settings: TrafficSettings, ranks: int) -> list[TrafficRow]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*launcher, "-m", "megatron_fwpkm.profiling.traffic_benchmark", json.dumps(asdict(settings))],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode != 0:
        raise RuntimeError(f"the measurement over {ranks} ranks failed:\n{done.stderr[-2000:]}")
    return [TrafficRow(**row) for row in json.loads(done.stdout.splitlines()[-1])]


def run_traffic_benchmark(settings: TrafficSettings, out: Path) -> dict[str, Any]:
    """Measure over all numbers of ranks, print tables, and write the figures as JSON."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 150)
    rows: list[TrafficRow] = []
    for ranks in settings.ranks:
        with console.status(f"{ranks} ranks"):
            rows += _in_job(settings, ranks)
    imbalance = owner_imbalance(settings)
    modelled = [
        {"kind": row.kind, "ranks": row.ranks, **{link.name: _modelled(row, link.name) for link in LINKS}}
        for row in rows
    ]
    found = {
        "settings": asdict(settings),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 thread a process, torch {torch.__version__}, gloo",
        "rows": [asdict(row) for row in rows],
        "imbalance": imbalance,
        "modelled_seconds": modelled,
        "links": [asdict(link) for link in LINKS],
    }
    for table in (_measured_table(rows), _model_table(rows), _imbalance_table(imbalance)):
        console.print(table)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
    console.print(f"figures in {out}; {found['machine']}", highlight=False)
    return found


def _modelled(row: TrafficRow, name: str) -> float:
    link = next(link for link in LINKS if link.name == name)
    return modelled_seconds(row.most_bytes, row.most_messages, link)


def _measured_table(rows: list[TrafficRow]) -> Any:
    from rich.table import Table

    columns = ("ranks", "way", "bytes/token", "forward", "backward", "keys", "messages/call", "load", "distinct")
    table = Table(
        *columns, "forward ms", "total ms", "lowest", box=None, title="sent by all ranks, and time on this machine"
    )
    for row in rows:
        keys, backward = row.sent_bytes["keys"], row.sent_bytes["backward"]
        total = sum(row.sent_bytes.values())
        sizes = (total, total - backward - keys, backward, keys)
        table.add_row(
            str(row.ranks),
            NAMES[row.kind],
            *(f"{size / row.tokens:.0f}" for size in sizes),
            str(sum(row.messages.values())),
            f"{row.load:.2f}",
            f"{row.distinct_ratio:.2f}",
            f"{row.forward_s * 1e3:.1f}",
            f"{row.total_s * 1e3:.1f}",
            f"{row.lowest_s * 1e3:.1f}",
        )
    return table


def _model_table(rows: list[TrafficRow]) -> Any:
    from rich.table import Table

    names = [
        f"{link.name} ({link.bytes_per_second / 1e9:.0f} GB/s, {link.seconds_per_message * 1e6:.0f} us)"
        for link in LINKS
    ]
    table = Table("ranks", "way", *names, box=None, title="model: ms to send a call's messages, without overlap")
    for row in rows:
        if row.ranks > 1:
            table.add_row(
                str(row.ranks), NAMES[row.kind], *(f"{_modelled(row, link.name) * 1e3:.3f}" for link in LINKS)
            )
    return table


def _imbalance_table(imbalance: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    columns = ("hot sub-keys", "ranks", "(a + b) mod R", "slot mod R")
    table = Table(*columns, box=None, title="reads of the busiest owner / mean, a chunk")
    for row in imbalance:
        table.add_row(row["hot"], str(row["ranks"]), f"{row['sum_of_subkeys']:.2f}", f"{row['slot']:.2f}")
    return table


def _main() -> None:
    request = json.loads(sys.argv[1])
    dist.init_process_group("gloo")
    rows = measure_ways(TrafficSettings(**{**request, "ranks": tuple(request["ranks"])}))
    if dist.get_rank() == 0:
        print(json.dumps([asdict(row) for row in rows]), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _main()
