"""Memories spread over ranks against one rank with the whole memory; prints the largest relative errors on rank 0.

Several replicas' batches in one memory group are held against one rank that has the batches one after the other.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fwpkm.memory import FastState, MemoryConfig, MemoryTrace
from megatron_fwpkm.memory.functional import fast_memory
from megatron_fwpkm.memory.groups import make_memory_group
from megatron_fwpkm.memory.placement import ALONE, Placement
from megatron_fwpkm.memory.sharding import column_share, token_share

SMALL: dict[str, Any] = {"heads": 2, "topk": 3, "n_subkeys": 7, "k_dim": 6, "v_dim": 5, "chunk_size": 8}
CASES: dict[str, dict[str, Any]] = {
    "base": {},
    "sixteen": {"n_subkeys": 8, "v_dim": 8},
    "lookahead 2": {"lookahead": 2},
    "no lookahead": {"lookahead": 0},
    "per sequence": {"reset": "per_sequence"},
    "per sequence, keys too": {"reset": "per_sequence", "values_only": False, "lookahead": 2},
    "clamp and decay": {"gradient_clip": True, "weight_decay": 0.05},
    "keys too": {"values_only": False},
    "keys too, clamped": {"values_only": False, "gradient_clip": True},
    "dot": {"score_type": "dot_product"},
    "all to one owner": {"topk": 1, "heads": 1},
    "no addressing loss": {"addressing_loss": "none"},
}
BATCH, TOKENS = 2, 27  # the last chunk has 3 tokens: fewer than ranks
COLUMNS = 12  # which 2, 3 and 4 divide
LAYOUTS = {  # replicas, ranks of each
    "dynamic": [(1, 2), (1, 3), (1, 4), (2, 1), (2, 2)],
    "static": [(1, 3), (1, 4), (2, 2)],
    "columns": [(1, 3), (1, 4)],
}


@dataclass
class Layout:
    """Groups of one layout, made by all ranks together."""

    replicas: int
    ranks: int
    everyone: dist.ProcessGroup
    of_replica: dist.ProcessGroup | None

    @classmethod
    def make(cls, replicas: int, ranks: int) -> Layout:
        everyone = dist.new_group(list(range(replicas * ranks)))
        of_replicas = [dist.new_group(list(range(p * ranks, (p + 1) * ranks))) for p in range(replicas)]
        rank = dist.get_rank()
        here = of_replicas[rank // ranks] if ranks > 1 and rank < replicas * ranks else None
        return cls(replicas, ranks, everyone, here)

    def placement(self, kind: str) -> Placement:
        sharding, routing = ("columns", "dynamic") if kind == "columns" else ("slots", kind)
        return Placement(self.of_replica, self.everyone, sharding=sharding, routing=routing)  # type: ignore[arg-type]


def inputs(config: MemoryConfig, batch: int, masked: bool, same: bool) -> tuple[list[Tensor], Tensor | None]:
    """Query, target and gate, and the mask."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query = draw(batch, TOKENS, config.heads, config.k_dim)
    if same:
        query = query[:1, :1].expand_as(query) + 1e-3 * query
    target, gate = draw(batch, TOKENS, config.v_dim), draw(batch, TOKENS).sigmoid()
    mask = torch.rand(batch, TOKENS, generator=generator) > 0.3
    return [query, target, gate], mask if masked else None


def run(config: MemoryConfig, batch: int, masked: bool, same: bool, where: Placement) -> dict[str, Tensor]:
    """Two calls with gradients; everything as one rank would have it."""
    group, rank, ranks = where.memory_group, where.memory_rank, where.memory_ranks
    apart = config.reset == "per_sequence" and where.replicas > 1
    state = FastState(config, seed=3, dtype=torch.float64, rank=rank, ranks=ranks, sharding=where.sharding)
    memory_group = make_memory_group(where, config, apart=apart)
    first_sequence = rank // where.tensor_ranks * BATCH
    own_batch = slice(0, batch) if group is None else slice(first_sequence, first_sequence + BATCH)
    by_columns = where.sharding == "columns"
    share = (column_share if by_columns else token_share)(TOKENS, config, where.tensor_rank, where.tensor_ranks)
    vectors = torch.arange(TOKENS) if by_columns else share.own
    targets = torch.arange(TOKENS) if group is None else share.targets
    found: dict[str, Tensor] = {}

    def whole(part: Tensor, like: Tensor, columns: Any = slice(None), places: Tensor = vectors) -> Tensor:
        """What all ranks have of a tensor of [batch, tokens, ...], together."""
        total = torch.zeros_like(like)
        total[own_batch][:, places, columns] = part
        if group is not None:
            dist.all_reduce(total, group=group)
        return total

    for call in range(2):
        (query, target, gate), mask = inputs(config, batch, masked, same)
        weights = torch.randn(target.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        parts = [
            query[own_batch][:, share.own],
            target[own_batch][:, targets, state.columns],
            gate[own_batch][:, vectors],
        ]
        leaves = [part.clone().requires_grad_() for part in parts]
        own_mask = None if mask is None else mask[own_batch][:, vectors]
        view = state.view(parts[0].shape[0], training=True, replicas=memory_group.tables)
        trace = MemoryTrace()
        spans = None if group is None else share.spans
        own_query, own_target, own_gate = leaves
        output = fast_memory(
            own_query, own_target, own_gate, own_mask, view, config, trace=trace, group=memory_group, spans=spans
        )
        (output * weights[own_batch][:, vectors, state.columns]).sum().backward()
        found[f"output {call}"] = whole(output.detach(), target, state.columns)
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        first = float(not by_columns or rank == 0)  # with columns the gates' are whole on every rank
        found[f"d query {call}"] = whole(gradients[0], query, places=share.own)
        found[f"d target {call}"] = whole(gradients[1], target, state.columns, targets)
        found[f"d gate {call}"] = whole(gradients[2] * first, gate.unsqueeze(2)[..., 0], ..., vectors)
        assert trace.losses is not None and trace.memory_gradient is not None
        found[f"losses {call}"] = whole(trace.losses * first, gate, ..., share.targets - config.lookahead)
        if config.reset == "carry":
            found[f"d keys {call}"] = trace.memory_gradient.keys_MH2nd
            found[f"d values {call}"] = table(trace.memory_gradient.values_ND(state.num_slots), state, where, config)
        if by_columns:
            equal_on_all(gradients[2], group)
    equal_on_all(state.keys_H2nd, group)
    found["keys"], found["values"] = state.keys_H2nd, table(state.values_ND(), state, where, config)
    return found


def table(part: Tensor, state: FastState, where: Placement, config: MemoryConfig) -> Tensor:
    """A table of which all ranks have parts."""
    if where.memory_group is None:
        return part
    total = torch.zeros(config.num_slots, config.v_dim, dtype=torch.float64)
    if state.owned is None:
        total[:, state.columns] = part
    else:
        total[state.owned[state.owned >= 0]] = part[state.owned >= 0]
    dist.all_reduce(total, group=where.memory_group)
    return total


def equal_on_all(tensor: Tensor, group: dist.ProcessGroup | None) -> None:
    """Bitwise."""
    if group is not None:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        assert all(torch.equal(one, parts[0]) for one in parts), "differs between ranks"


def check(name: str, masked: bool, layouts: dict[tuple[int, int], Layout]) -> dict[str, float]:
    """Errors of one case over all kinds of groups; only rank 0's say something."""
    same, errors = name == "all to one owner", {}
    wanted: dict[tuple[int, int], dict[str, Tensor]] = {}
    for kind, (replicas, ranks) in [(kind, layout) for kind, several in LAYOUTS.items() for layout in several]:
        if dist.get_rank() >= replicas * ranks or (kind != "dynamic" and not masked):
            continue
        config = MemoryConfig(**{**SMALL, **CASES[name], **({"v_dim": COLUMNS} if kind == "columns" else {})})
        batch = replicas * BATCH
        found = run(config, batch, masked, same, layouts[replicas, ranks].placement(kind))
        if dist.get_rank() > 0:
            continue
        reference = wanted.get((batch, config.v_dim)) or run(config, batch, masked, same, ALONE)
        wanted[batch, config.v_dim] = reference
        assert found.keys() == reference.keys()
        worst = max(float((found[k] - v).norm() / v.norm().clamp_min(1e-30)) for k, v in reference.items())
        errors[f"{kind}: {name}, {'masked' if masked else 'whole'}, {replicas} x {ranks} ranks"] = worst
    return errors


def refusals(layouts: dict[tuple[int, int], Layout]) -> dict[str, str]:
    """What all ranks say to bad input, alike; nobody waits for anybody."""
    config = MemoryConfig(**SMALL)
    four, two = layouts[1, 4].placement("dynamic"), layouts[2, 2]
    one_bad = [t.clone() for t in inputs(config, BATCH, False, False)[0]]
    if dist.get_rank() == 2:
        one_bad[1][0, 5, 0] = float("nan")
    careful = MemoryConfig(**SMALL, check_finite=True)

    def call(config: MemoryConfig, where: Placement, apart: bool, tensors: list[Tensor], replicas: int) -> None:
        state = FastState(config, dtype=torch.float64, rank=where.memory_rank, ranks=where.memory_ranks)
        share = token_share(TOKENS, config, where.tensor_rank, where.tensor_ranks)
        parts = tensors[0][:, share.own], tensors[1][:, share.targets], tensors[2][:, share.own]
        view = state.view(BATCH, training=True, replicas=replicas)
        fast_memory(*parts, None, view, config, group=make_memory_group(where, config, apart=apart), spans=share.spans)

    each = MemoryConfig(**SMALL, reset="per_sequence")
    attempts: dict[str, Any] = {
        "columns of replicas": lambda: make_memory_group(two.placement("columns"), config),
        "indivisible columns": lambda: make_memory_group(layouts[1, 4].placement("columns"), config),
        "few sub-keys": lambda: make_memory_group(four, MemoryConfig(**{**SMALL, "n_subkeys": 3})),
        "one for all, each its own": lambda: call(each, two.placement("dynamic"), False, one_bad, 1),
        "apart, but one table": lambda: call(each, two.placement("static"), True, one_bad, 1),
        "not finite": lambda: call(careful, four, False, one_bad, 1),
    }
    said = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except ValueError as error:
            said[name] = str(error)
        everyone: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(everyone, said.get(name, "nothing"))
        assert "nothing" not in everyone, (name, everyone)
    return said


def main() -> None:
    dist.init_process_group("gloo")
    layouts = {layout: Layout.make(*layout) for layout in sorted({one for some in LAYOUTS.values() for one in some})}
    errors: dict[str, float] = {}
    for name in CASES:
        for masked in (False, True):
            errors |= check(name, masked, layouts)
    said = refusals(layouts)
    if dist.get_rank() == 0:
        print(json.dumps({"errors": errors, "said": said}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
