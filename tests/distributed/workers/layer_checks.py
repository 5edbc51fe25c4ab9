"""Memory layers over ranks against one rank with the whole; prints the largest relative errors on rank 0."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fwpkm.memory import FwPKMLayer, MemoryConfig
from megatron_fwpkm.memory.column_layer import ColumnFwPKMLayer
from megatron_fwpkm.memory.placement import ALONE, Placement, Routing, Sharding
from megatron_fwpkm.parallel import topology
from megatron_fwpkm.parallel.backend import megatron_backend
from megatron_fwpkm.parallel.settings import ParallelConfig

SMALL: dict[str, Any] = {"heads": 2, "topk": 3, "n_subkeys": 8, "k_dim": 6, "v_dim": 8, "chunk_size": 7}
CASES: dict[str, dict[str, Any]] = {
    "carry": {},
    "lookahead 2": {"lookahead": 2},
    "no lookahead": {"lookahead": 0},
    "whole sequence": {"chunk_size": "sequence"},
    "per step": {"reset": "per_step"},
    "per sequence": {"reset": "per_sequence"},
    "per document": {"reset": "per_document"},
    "keys too, clamped, decayed": {"values_only": False, "gradient_clip": True, "weight_decay": 0.05},
    "ungated": {"weigh_write_by_gate": False, "fuse_output_by_gate": False, "normalize_value": False},
}
BATCH, TOKENS, HIDDEN = 2, 36, 6  # of a replica; stretches of 18 or 9 tokens, chunks of 7
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 12 + [2] * 19, [0] * 19 + [1] * 16 + [2]])


@dataclass(frozen=True)
class Layout:
    """Ranks of one memory: `replicas` batches, each worked on by `ranks`."""

    ranks: int
    sequence_parallel: bool = False
    replicas: int = 1
    routing: Routing = "dynamic"
    sharding: Sharding = "slots"


LAYOUTS = (
    Layout(2),
    Layout(2, sequence_parallel=True),
    Layout(4),
    Layout(4, sequence_parallel=True),
    Layout(2, sequence_parallel=True, routing="static"),
    Layout(4, routing="static"),
    Layout(1, replicas=2),
    Layout(2, replicas=2),
    Layout(2, sequence_parallel=True, replicas=2, routing="static"),
    Layout(2, sharding="columns"),
    Layout(2, sequence_parallel=True, sharding="columns"),
    Layout(4, sequence_parallel=True, sharding="columns"),
)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_layer(config: MemoryConfig, placement: Placement) -> FwPKMLayer:
    layer: FwPKMLayer
    if placement.sharding == "columns":
        layers = megatron_backend(0.1, 1e-5, placement)
        layer = ColumnFwPKMLayer(HIDDEN, config, placement, layers, seed=3, dtype=torch.float64)
    else:
        layer = FwPKMLayer(HIDDEN, config, seed=3, dtype=torch.float64, placement=placement)
    layer.double()
    for number, (name, parameter) in enumerate(layer.named_parameters()):
        whole = 0.5 * draw(number, *whole_shape(name, parameter, placement))
        with torch.no_grad():
            parameter.copy_(own_part(whole, parameter, placement))
    return layer


def whole_shape(name: str, parameter: Tensor, placement: Placement) -> list[int]:
    """Of a parameter that may be a part of columns."""
    shape = list(parameter.shape)
    if placement.sharding == "columns":
        split = {"value_projection.weight": 0, "value_projection.bias": 0, "output_norm.weight": 0}
        split["output_projection.weight"] = 1
        if name in split:
            shape[split[name]] *= placement.tensor_ranks
    return shape


def own_part(whole: Tensor, like: Tensor, placement: Placement) -> Tensor:
    """Of a whole parameter."""
    for dim in range(whole.dim()):
        if whole.shape[dim] != like.shape[dim]:
            whole = whole.chunk(placement.tensor_ranks, dim)[placement.tensor_rank]
    return whole


class View:
    """What this rank has of the batches of all replicas."""

    def __init__(self, placement: Placement, replicas: int) -> None:
        self.placement, self.replicas = placement, replicas
        self.replica = placement.memory_rank // placement.tensor_ranks
        self.batch = BATCH * replicas // placement.replicas

    def own(self, x: Tensor) -> Tensor:
        """Of [replicas * B, T, ...]: its replica's sequences, and its stretch of them."""
        x = x[self.replica * self.batch : (self.replica + 1) * self.batch]
        if self.placement.sequence_parallel:
            x = x.chunk(self.placement.tensor_ranks, 1)[self.placement.tensor_rank]
        return x

    def sequences(self, x: Tensor) -> Tensor:
        """Its replica's sequences, whole."""
        return x[self.replica * self.batch : (self.replica + 1) * self.batch]

    def whole(self, x: Tensor) -> Tensor:
        """The inverse of `own`."""
        if self.placement.memory_group is None:
            return x
        parts = [torch.empty_like(x) for _ in range(self.placement.memory_ranks)]
        dist.all_gather(parts, x.contiguous(), group=self.placement.memory_group)
        ranks = self.placement.tensor_ranks
        batches = [parts[first : first + ranks] for first in range(0, len(parts), ranks)]
        return torch.cat([torch.cat(b, 1) if self.placement.sequence_parallel else b[0] for b in batches])

    def total(self, x: Tensor, name: str) -> Tensor:
        """Gradient of a whole parameter: the sum of what all ranks' tokens contribute, or all ranks' parts."""
        if self.placement.sharding == "columns":  # Megatron's layers have summed
            shape = whole_shape(name, x, self.placement)
            return next((gather(x, self.placement, d) for d in range(x.dim()) if x.shape[d] != shape[d]), x)
        if self.placement.memory_group is not None:
            dist.all_reduce(x, group=self.placement.memory_group)
        return x


def gather(x: Tensor, placement: Placement, dim: int) -> Tensor:
    """All ranks' parts along one dimension."""
    parts = [torch.empty_like(x) for _ in range(placement.memory_ranks)]
    dist.all_gather(parts, x.contiguous(), group=placement.memory_group)
    return torch.cat(parts, dim)


def values(layer: FwPKMLayer) -> Tensor:
    """Dense true values of the whole memory."""
    state, own = layer.fast_state, layer.fast_state.values_ND()
    if layer.placement.sharding == "columns":
        return gather(own, layer.placement, 1)
    if state.owned is None:
        return own
    dense = own.new_zeros(layer.config.num_slots, own.shape[1])
    dense[state.owned[state.owned >= 0]] = own[state.owned >= 0]
    dist.all_reduce(dense, group=layer.placement.memory_group)
    return dense


def run(config: MemoryConfig, masked: bool, placement: Placement, replicas: int) -> dict[str, Tensor]:
    layer, found, view = make_layer(config, placement), dict[str, Tensor](), View(placement, replicas)
    shape = (BATCH * replicas, TOKENS)
    documents = view.sequences(DOCUMENTS.repeat(replicas, 1))
    mask = view.sequences(draw(5, *shape) > -0.5) if masked else None
    for call in range(2):
        hidden = view.own(draw(20 + call, *shape, HIDDEN)).clone().requires_grad_()
        output = layer(hidden, mask, None, documents)
        (output * view.own(draw(30, *shape, HIDDEN))).sum().backward()
        assert hidden.grad is not None
        found[f"output {call}"] = view.whole(output.detach())
        found[f"d hidden {call}"] = view.whole(hidden.grad)
        found.update({f"statistics {name} {call}": value.double() for name, value in layer.statistics().items()})
    for name, parameter in layer.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found[f"d {name}"] = view.total(gradient, name)
    layer.eval()
    with torch.no_grad(), layer.fast_state.evaluation():
        for call in range(2):
            hidden = view.own(draw(40 + call, *shape, HIDDEN))
            found[f"evaluation {call}"] = view.whole(layer(hidden, mask, None, documents))
    layer.memory_reads = False
    with torch.no_grad():
        found["reads off"] = view.whole(layer(view.own(draw(40, *shape, HIDDEN)), mask, None, documents))
    layer.memory_reads = True
    found["values"], found["keys"] = values(layer), layer.fast_state.keys_H2nd
    if not placement.sequence_parallel and placement.replicas == 1:
        found.update(stream(layer, mask, shape[0]))
    return found


@torch.no_grad()
def stream(layer: FwPKMLayer, mask: Tensor | None, batch: int) -> dict[str, Tensor]:
    """Tokens in pieces through a cache; a shared memory that is kept."""
    hidden, sizes = draw(50, batch, TOKENS, HIDDEN), [1, 9, 26]
    masks = [None] * len(sizes) if mask is None else mask.split(sizes, 1)
    cache = layer.make_cache(batch)
    pieces = [layer(piece, own, cache) for piece, own in zip(hidden.split(sizes, 1), masks, strict=True)]
    cache = layer.make_cache(batch, memory="shared")
    layer(hidden, mask, cache)
    cache.finish()
    cache.commit()
    return {"cache": torch.cat(pieces, 1), "kept values": values(layer), "kept keys": layer.fast_state.keys_H2nd}


def refused(placement: Placement) -> list[str]:
    """What a layer says of calls that don't fit, the same on all ranks; none of them may wait for another rank."""
    layer = make_layer(MemoryConfig(**SMALL), placement)
    ranks = placement.tensor_ranks if placement.sequence_parallel else 1
    hidden = draw(1, BATCH, TOKENS // ranks, HIDDEN)
    masks = [torch.ones(TOKENS, BATCH), torch.ones(BATCH, TOKENS // 2), torch.ones(BATCH, TOKENS)]
    calls: list[Callable[[], Any]] = [
        lambda: layer(hidden, masks[0].bool()),
        lambda: layer(hidden, masks[1].bool()),
        lambda: layer(hidden, masks[2]),
    ]
    if placement.sequence_parallel and placement.replicas == 1:
        calls.append(lambda: layer(hidden, None, layer.make_cache(BATCH)))
    said = []
    for call in calls:
        try:
            call()
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))
    # Megatron's sequence-parallel layers keep a buffer, which must not come from inference mode.
    megatron = placement.sharding == "columns" and placement.sequence_parallel
    with torch.no_grad() if megatron else torch.inference_mode():
        layer.eval()(hidden)
    layer.train()(hidden.requires_grad_()).sum().backward()  # tensors of inference are not kept
    return said


def placements() -> Iterator[tuple[Layout, Placement]]:
    """Every layout, with this rank's groups; Megatron's are those of the newest layout with columns."""
    world, rank = dist.get_world_size(), dist.get_rank()
    sizes = {layout.ranks * layout.replicas for layout in LAYOUTS} | {layout.ranks for layout in LAYOUTS}
    groups = {
        size: [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
        for size in sorted(sizes)
    }
    for layout in LAYOUTS:
        if layout.sharding == "columns":
            settings = {"tensor": layout.ranks, "sequence_parallel": layout.sequence_parallel}
            whole = {**settings, "memory": {"sharding": "columns"}, "timeout_seconds": 60}
            yield layout, topology.build_groups(ParallelConfig.model_validate(whole)).placement
            continue
        tensor_group = groups[layout.ranks][rank // layout.ranks] if layout.ranks > 1 else None
        together = layout.ranks * layout.replicas
        yield (
            layout,
            Placement(
                tensor_group=tensor_group,
                memory_group=groups[together][rank // together],
                sequence_parallel=layout.sequence_parallel,
                routing=layout.routing,
            ),
        )


def main() -> None:
    topology.initialize(ParallelConfig(timeout_seconds=60))
    errors: dict[str, float] = {}
    said: dict[str, list[str]] = {}
    wanted = {
        (name, masked, n): run(MemoryConfig(**{**SMALL, **changes}), masked, ALONE, n)
        for name, changes in CASES.items()
        for masked in (False, True)
        for n in (1, 2)
    }
    for place, (layout, placement) in enumerate(placements()):
        if placement.tensor_ranks > 1:
            said[str(layout)] = refused(placement)
        for number, (name, changes) in enumerate(CASES.items()):
            if layout.replicas > 1 and name == "per document":
                continue  # refused: their documents differ
            if (number + place) % 3 == 0:
                continue  # each layout has six of the nine cases or so, and each case eight of the twelve layouts
            masked = (number + place) % 2 == 0  # each case and each layout has both
            found = run(MemoryConfig(**{**SMALL, **changes}), masked, placement, layout.replicas)
            for key in found:
                expected = wanted[name, masked, layout.replicas][key]
                error = float((found[key] - expected).norm() / expected.norm().clamp_min(1e-30))
                errors[f"{name}, {'masked' if masked else 'whole'}, {layout}: {key}"] = error
    every: list[dict[str, float]] = [{}] * dist.get_world_size()
    dist.all_gather_object(every, errors)
    all_said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_said, said)
    assert all(one == said for one in all_said), all_said
    rank = dist.get_rank()
    topology.shut_down()
    if rank == 0:  # the worst of all ranks; what is not a number is no success
        worst = {
            key: max((one[key] for one in every), key=lambda e: math.inf if math.isnan(e) else e) for key in errors
        }
        print(json.dumps({"errors": worst, "said": said}), flush=True)


if __name__ == "__main__":
    main()
