"""Memory layers over ranks against one rank with the whole; prints the largest relative errors on rank 0.

Arguments: a configuration (not read) and the number of tensor-parallel ranks.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fwpkm.memory import FwPKMLayer, MemoryConfig
from megatron_fwpkm.memory.placement import ALONE, Placement

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
BATCH, TOKENS, HIDDEN = 2, 36, 6
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 12 + [2] * 19, [0] * 19 + [1] * 16 + [2]])


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_layer(config: MemoryConfig, placement: Placement) -> FwPKMLayer:
    torch.manual_seed(11)
    layer = FwPKMLayer(HIDDEN, config, seed=3, dtype=torch.float64, placement=placement).double()
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(0.5 * draw(number, *parameter.shape))
    return layer


def stretch(x: Tensor, placement: Placement) -> Tensor:
    """What this rank has of [B, T, ...] outside the layer."""
    return x.chunk(placement.tensor_ranks, 1)[placement.tensor_rank] if placement.sequence_parallel else x


def whole(x: Tensor, placement: Placement) -> Tensor:
    """[B, T, ...] from every rank's stretch."""
    if not placement.sequence_parallel:
        return x
    parts = [torch.empty_like(x) for _ in range(placement.tensor_ranks)]
    dist.all_gather(parts, x.contiguous(), group=placement.tensor_group)
    return torch.cat(parts, 1)


def values(layer: FwPKMLayer) -> Tensor:
    """Dense true values of the whole memory."""
    state, own = layer.fast_state, layer.fast_state.values_ND()
    if state.owned is None:
        return own
    dense = own.new_zeros(layer.config.num_slots, own.shape[1])
    dense[state.owned[state.owned >= 0]] = own[state.owned >= 0]
    dist.all_reduce(dense, group=layer.placement.memory_group)
    return dense


def run(config: MemoryConfig, masked: bool, placement: Placement) -> dict[str, Tensor]:
    layer, found = make_layer(config, placement), dict[str, Tensor]()
    mask = draw(5, BATCH, TOKENS) > -0.5 if masked else None
    for call in range(2):
        hidden = stretch(draw(20 + call, BATCH, TOKENS, HIDDEN), placement).clone().requires_grad_()
        output = layer(hidden, mask, None, DOCUMENTS)
        (output * stretch(draw(30, BATCH, TOKENS, HIDDEN), placement)).sum().backward()
        assert hidden.grad is not None
        found[f"output {call}"] = whole(output.detach(), placement)
        found[f"d hidden {call}"] = whole(hidden.grad, placement)
        found.update({f"{name} {call}": value.double() for name, value in layer.statistics().items()})
    for name, parameter in layer.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if placement.tensor_group is not None:  # each rank has seen its own tokens
            dist.all_reduce(gradient, group=placement.tensor_group)
        found[f"d {name}"] = gradient
    layer.eval()
    with torch.no_grad(), layer.fast_state.evaluation():
        for call in range(2):
            found[f"evaluation {call}"] = whole(
                layer(stretch(draw(40 + call, BATCH, TOKENS, HIDDEN), placement), mask, None, DOCUMENTS), placement
            )
    layer.memory_reads = False
    with torch.no_grad():
        found["reads off"] = whole(
            layer(stretch(draw(40, BATCH, TOKENS, HIDDEN), placement), mask, None, DOCUMENTS), placement
        )
    layer.memory_reads = True
    found["values"], found["keys"] = values(layer), layer.fast_state.keys_H2nd
    if not placement.sequence_parallel:
        found.update(stream(layer, mask))
    return found


@torch.no_grad()
def stream(layer: FwPKMLayer, mask: Tensor | None) -> dict[str, Tensor]:
    """Tokens in pieces through a cache; a shared memory that is kept."""
    hidden, sizes = draw(50, BATCH, TOKENS, HIDDEN), [1, 9, 26]
    masks = [None] * len(sizes) if mask is None else mask.split(sizes, 1)
    cache = layer.make_cache(BATCH)
    pieces = [layer(piece, own, cache) for piece, own in zip(hidden.split(sizes, 1), masks, strict=True)]
    cache = layer.make_cache(BATCH, memory="shared")
    layer(hidden, mask, cache)
    cache.finish()
    cache.commit()
    return {"cache": torch.cat(pieces, 1), "kept values": values(layer), "kept keys": layer.fast_state.keys_H2nd}


def main() -> None:
    dist.init_process_group("gloo")
    ranks = int(sys.argv[2])
    groups = [dist.new_group(list(range(first, first + ranks))) for first in range(0, dist.get_world_size(), ranks)]
    group = groups[dist.get_rank() // ranks]
    errors: dict[str, float] = {}
    for name, changes in CASES.items():
        config = MemoryConfig(**{**SMALL, **changes})
        for masked in (False, True):
            for sequence_parallel in (False, True):
                placement = Placement(tensor_group=group, memory_group=group, sequence_parallel=sequence_parallel)
                wanted, found = run(config, masked, ALONE), run(config, masked, placement)
                for key in found:
                    error = float((found[key] - wanted[key]).norm() / wanted[key].norm().clamp_min(1e-30))
                    layout = "sequence parallel" if sequence_parallel else "tensor parallel"
                    errors[f"{name}, {'masked' if masked else 'whole'}, {layout}: {key}"] = error
    if dist.get_rank() == 0:
        print(json.dumps(errors), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
