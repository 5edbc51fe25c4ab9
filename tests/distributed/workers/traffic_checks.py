"""What memory groups send against the formulas, and row shipping against one rank; prints them on rank 0.

Each of the JSON's entries is [measured, expected] of one way of exchange, or the error of row shipping.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fwpkm.memory import FastState, MemoryConfig, MemoryTrace
from megatron_fwpkm.memory.functional import fast_memory
from megatron_fwpkm.memory.groups import make_memory_group
from megatron_fwpkm.memory.placement import Placement
from megatron_fwpkm.memory.sharding import Owners, column_share, token_share
from megatron_fwpkm.memory.traffic import Traffic
from megatron_fwpkm.profiling.row_shipping import RowShippingGroup, ShippedCall
from megatron_fwpkm.profiling.traffic_model import Remote, count_remote, expected_bytes

SIZES: dict[str, Any] = {"heads": 2, "topk": 3, "n_subkeys": 8, "k_dim": 6, "v_dim": 12, "chunk_size": 8}
CASES: dict[str, dict[str, Any]] = {
    "base": {},
    "keys too": {"values_only": False},
    "no addressing loss": {"addressing_loss": "none"},
    "ungated": {"weigh_write_by_gate": False},
    "official keys": {"values_only": False, "key_gradient": "official"},
    "a last chunk without pairs": {"values_only": False, "chunk_size": 13},
}
BATCH, TOKENS = 2, 27


def draw(config: MemoryConfig, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, target, gate, and the output's gradient."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(config.heads, config.k_dim), (config.v_dim,), (), (config.v_dim,)]
    query, target, gate, cotangent = (
        torch.randn(BATCH, TOKENS, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    )
    return query, target, gate.sigmoid(), cotangent


def total(numbers: list[int]) -> list[int]:
    """Summed over all ranks."""
    tensor = torch.tensor(numbers)
    dist.all_reduce(tensor)
    return [int(one) for one in tensor]


def summed(traffic: Traffic) -> dict[str, int]:
    """Bytes of all ranks by phase."""
    phases = ["plan", "read", "write", "keys", "backward"]
    return {
        name: sent for name, sent in zip(phases, total([traffic.sent_bytes[p] for p in phases]), strict=True) if sent
    }


def measure(kind: str, config: MemoryConfig, dtype: torch.dtype = torch.float64) -> list[Any]:
    """[measured, expected] of a forward and a backward pass."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    sharding, routing = ("columns", "dynamic") if kind == "columns" else ("slots", kind)
    world = dist.group.WORLD
    where = Placement(world, world, sharding=sharding, routing=routing)  # type: ignore[arg-type]
    group = make_memory_group(where, config)
    share = (column_share if kind == "columns" else token_share)(TOKENS, config, rank, ranks)
    state = FastState(config, seed=3, dtype=dtype, rank=rank, ranks=ranks, sharding=where.sharding)
    query, target, gate, cotangent = draw(config, dtype)
    vectors = torch.arange(TOKENS) if kind == "columns" else share.own
    trace = MemoryTrace()
    call: Any = {"group": group, "spans": share.spans}
    parts = (query[:, share.own].requires_grad_(), target[:, share.targets, state.columns], gate[:, vectors])
    with torch.no_grad():  # for the slots; this reads what the call below reads, from a state of its own
        twin = FastState(config, seed=3, dtype=dtype, rank=rank, ranks=ranks, sharding=where.sharding)
        fast_memory(*parts, None, twin, config, trace=trace, **call)
    group.traffic.take()  # type: ignore[union-attr]
    gate_leaf = parts[2].clone().requires_grad_()
    output = fast_memory(parts[0], parts[1], gate_leaf, None, state, config, **call)
    output.backward(cotangent[:, vectors, state.columns])
    traffic = group.traffic.take()  # type: ignore[union-attr]
    assert trace.slots_BTHK is not None
    remote = remote_of(trace.slots_BTHK, share.spans, Owners(config.n_subkeys, ranks), rank)
    reads, of_all = total([traffic.reads_here])[0], traffic.reads_of_all
    assert reads == of_all == BATCH * TOKENS * config.reads_per_token * (ranks if kind == "columns" else 1)
    lengths = [span.length for span in share.spans]
    return [summed(traffic), expected_bytes(kind, config, BATCH, lengths, remote, ranks, dtype.itemsize)]  # type: ignore[arg-type]


def remote_of(slots_BTHK: Tensor, spans: list[Any], owners: Owners, rank: int) -> list[Remote]:
    """Of each chunk, for all ranks."""
    found = []
    for span in spans:
        far = count_remote(slots_BTHK[:, span.queries].flatten(2).flatten(0, 1), owners, rank)
        found.append(Remote(*total([far.pairs, far.reads, far.rows])))
    return found


def ship(config: MemoryConfig) -> tuple[list[Any], float]:
    """Row shipping: [measured, expected], and the largest relative error against one rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    assert dist.group.WORLD is not None
    owners, share = Owners(config.n_subkeys, ranks), token_share(TOKENS, config, rank, ranks)
    group = RowShippingGroup(dist.group.WORLD, owners, config.reads_per_token)
    state = FastState(config, seed=3, dtype=torch.float64, rank=rank, ranks=ranks)
    query, target, gate, cotangent = draw(config)
    call = ShippedCall(state, group, share.spans)
    output = call.forward(query[:, share.own], target[:, share.targets], gate[:, share.own], None)
    gradients = call.backward(cotangent[:, share.own])
    measured = summed(group.traffic.take())
    whole = FastState(config, seed=3, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (query, target, gate)]
    trace = MemoryTrace()
    reference = fast_memory(leaves[0], leaves[1], leaves[2], None, whole, config, trace=trace)
    reference.backward(cotangent)
    assert state.owned is not None and trace.slots_BTHK is not None and gradients[2] is not None
    there = state.owned >= 0
    pairs = [
        (output, reference.detach()[:, share.own]),
        (state.values_ND()[there], whole.values_ND()[state.owned[there]]),
        (state.keys_H2nd, whole.keys_H2nd),
    ]
    for found, leaf, places in zip(gradients, leaves, (share.own, share.targets, share.own), strict=True):
        assert found is not None and leaf.grad is not None
        pairs.append((found, leaf.grad[:, places]))
    error = torch.tensor(max(float((found - wanted).norm() / wanted.norm()) for found, wanted in pairs))
    dist.all_reduce(error, dist.ReduceOp.MAX)
    remote = remote_of(trace.slots_BTHK[:, share.own], share.spans, owners, rank)
    expected = expected_bytes("rows", config, BATCH, [span.length for span in share.spans], remote, ranks, 8)
    return [measured, expected], float(error)


def main() -> None:
    dist.init_process_group("gloo")
    result: dict[str, Any] = {"errors": {}, "traffic": {}}
    for name, changes in CASES.items():
        config = MemoryConfig(**{**SIZES, **changes})
        for kind in ("dynamic", "static", "columns"):
            result["traffic"][f"{kind}, {name}"] = measure(kind, config)
            if not changes:
                result["traffic"][f"{kind}, {name}, float32"] = measure(kind, config, torch.float32)
        result["traffic"][f"rows, {name}"], result["errors"][name] = ship(config)
    if dist.get_rank() == 0:
        print(json.dumps(result), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
