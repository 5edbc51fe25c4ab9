"""Memories spread over ranks against one rank with the whole memory; prints the largest relative errors on rank 0."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

from megatron_fwpkm.memory import FastState, MemoryConfig
from megatron_fwpkm.memory.functional import fast_memory
from megatron_fwpkm.memory.sharding import Owners, ProcessMemoryGroup, token_share

SMALL: dict[str, Any] = {"heads": 2, "topk": 3, "n_subkeys": 7, "k_dim": 6, "v_dim": 5, "chunk_size": 8}
CASES: dict[str, dict[str, Any]] = {
    "base": {},
    "sixteen": {"n_subkeys": 8, "v_dim": 8},
    "lookahead 2": {"lookahead": 2},
    "no lookahead": {"lookahead": 0},
    "per sequence": {"reset": "per_sequence"},
    "clamp and decay": {"gradient_clip": True, "weight_decay": 0.05},
    "keys too": {"values_only": False},
    "keys too, clamped": {"values_only": False, "gradient_clip": True},
    "dot": {"score_type": "dot_product"},
    "all to one owner": {"topk": 1, "heads": 1},
    "no addressing loss": {"addressing_loss": "none"},
}
BATCH, TOKENS = 2, 27  # the last chunk has 3 tokens: fewer than ranks


def inputs(config: MemoryConfig, masked: bool, same: bool) -> list[torch.Tensor | None]:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query = draw(BATCH, TOKENS, config.heads, config.k_dim)
    if same:
        query = query[:1, :1].expand_as(query) + 1e-3 * query
    target, gate = draw(BATCH, TOKENS, config.v_dim), draw(BATCH, TOKENS).sigmoid()
    mask = torch.rand(BATCH, TOKENS, generator=generator) > 0.3
    return [query, target, gate, mask if masked else None]


def run(config: MemoryConfig, masked: bool, same: bool, group: dist.ProcessGroup | None) -> dict[str, torch.Tensor]:
    """Two calls with gradients; everything as one rank would have it."""
    ranks = 1 if group is None else dist.get_world_size(group)
    rank = 0 if group is None else dist.get_rank(group)
    state = FastState(config, seed=3, dtype=torch.float64, rank=rank, ranks=ranks)
    found: dict[str, torch.Tensor] = {}
    for call in range(2):
        query, target, gate, mask = inputs(config, masked, same)
        assert query is not None and target is not None and gate is not None
        leaves = [tensor.clone().requires_grad_() for tensor in (query, target, gate)]
        view = state.view(BATCH, training=True)
        weights = torch.randn(
            BATCH, TOKENS, config.v_dim, generator=torch.Generator().manual_seed(9), dtype=torch.float64
        )
        if group is None:
            output = fast_memory(leaves[0], leaves[1], leaves[2], mask, view, config)
            (output * weights).sum().backward()
            found[f"output {call}"] = output.detach()
        else:
            share = token_share(TOKENS, config, rank, ranks)
            memory_group = ProcessMemoryGroup(group, Owners(config.n_subkeys, ranks), config.reads_per_token)
            own_mask = None if mask is None else mask[:, share.own]
            parts = (leaves[0][:, share.own], leaves[1][:, share.targets], leaves[2][:, share.own])
            output = fast_memory(*parts, own_mask, view, config, group=memory_group, spans=share.spans)
            (output * weights[:, share.own]).sum().backward()
            whole = torch.zeros(BATCH, TOKENS, config.v_dim, dtype=torch.float64)
            whole[:, share.own] = output.detach()
            dist.all_reduce(whole, group=group)
            found[f"output {call}"] = whole
        for name, leaf in zip(("query", "target", "gate"), leaves, strict=True):
            gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            if group is not None:
                dist.all_reduce(gradient, group=group)
            found[f"d {name} {call}"] = gradient
    found["keys"] = state.keys_H2nd
    values = state.values_ND()
    if group is not None:
        assert state.owned is not None
        whole = torch.zeros(config.num_slots, config.v_dim, dtype=torch.float64)
        there = state.owned >= 0
        whole[state.owned[there]] = values[there]
        dist.all_reduce(whole, group=group)
        values = whole
        keys = [torch.empty_like(state.keys_H2nd) for _ in range(ranks)]
        dist.all_gather(keys, state.keys_H2nd, group=group)
        assert all(torch.equal(one, keys[0]) for one in keys), "sub-keys differ between ranks"
    found["values"] = values
    return found


def main() -> None:
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    groups = {ranks: dist.new_group(list(range(ranks))) for ranks in range(2, world + 1)}
    errors: dict[str, float] = {}
    for name, changes in CASES.items():
        config = MemoryConfig(**{**SMALL, **changes})
        for masked in (False, True):
            same = name == "all to one owner"
            wanted = run(config, masked, same, None)
            for ranks, group in groups.items():
                if dist.get_rank() >= ranks:
                    continue
                found = run(config, masked, same, group)
                worst = max(float((found[k] - v).norm() / v.norm().clamp_min(1e-30)) for k, v in wanted.items())
                errors[f"{name}, {'masked' if masked else 'whole'}, {ranks} ranks"] = worst
    if dist.get_rank() == 0:
        print(json.dumps(errors), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
