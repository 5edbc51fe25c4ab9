"""A hybrid model over tensor-parallel ranks against the same in one process, in float64 and float32.

Prints the largest relative errors per layout, the worst parameters by name, on rank 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_fwpkm.errors import RankFailedError
from megatron_fwpkm.memory import FastState, MemoryConfig
from megatron_fwpkm.model.decoder import Decoder
from megatron_fwpkm.model.settings import MIXERS, DecoderConfig, DeltaNetConfig
from megatron_fwpkm.parallel import topology
from megatron_fwpkm.parallel.backend import Backend, TorchBackend, megatron_backend
from megatron_fwpkm.parallel.settings import ParallelConfig
from megatron_fwpkm.train.key_check import check_keys

CONFIG = DecoderConfig(
    hidden_size=32,
    layers=3,
    mixers=MIXERS,
    attention_heads=8,
    key_value_heads=4,
    head_dim=8,
    mlp_size=48,
    window=8,
    delta_net=DeltaNetConfig(key_heads=4, value_heads=8, key_head_dim=8, value_head_dim=6),
    memory=MemoryConfig(heads=1, topk=2, n_subkeys=6, k_dim=16, v_dim=16, chunk_size=8),
)
VOCABULARY = 64


def run(backend: Backend, tied: bool, dtype: torch.dtype) -> tuple[Tensor, Decoder]:
    """Forward and backward of a batch with several documents and ignored labels."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (2, 40), generator=generator)
    labels, documents = tokens.roll(-1, 1), (torch.arange(40) // 14).expand(2, 40)
    labels[0, 3:9] = -100
    # Behind a memory, gradients of decay rates are so little of what cancels in them that float32 can't hold them.
    memories = (0, 2) if dtype == torch.float64 else ()
    config = replace(CONFIG, tied_embeddings=tied, memory_layers=memories)
    model = Decoder(config, VOCABULARY, backend, seed=3, fast_dtype=dtype).to(dtype)
    loss_BT = model(tokens, labels, documents)
    loss_BT.mean().backward()
    return loss_BT.detach(), model


def share(whole: Tensor, part: Tensor) -> Tensor:
    """The part of a whole tensor that a rank's tensor of another shape stands for."""
    for dim in range(whole.dim()):
        if whole.shape[dim] != part.shape[dim]:
            return whole.chunk(whole.shape[dim] // part.shape[dim], dim)[
                parallel_state.get_tensor_model_parallel_rank()
            ]
    return whole


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))


def compare(loss: Tensor, whole: Decoder, split_loss: Tensor, split: Decoder) -> dict[str, float]:
    """Relative error of the loss and of every gradient, by name; the weights must be equal."""
    split_ranks = parallel_state.get_tensor_model_parallel_world_size()
    found, parameters = {"loss": error(split_loss, loss)}, dict(whole.named_parameters())
    for name, part in split.named_parameters():
        other = parameters.pop(name)
        assert torch.equal(part.detach(), share(other, part).detach()), name
        assert part.grad is not None and other.grad is not None, name
        difference = part.grad - share(other.grad, part.grad)
        found[name] = float(difference.norm() / other.grad.norm())
        marked = getattr(part, "tensor_model_parallel", False)
        if split_ranks > 1 and marked != (part.shape != other.shape):
            found[f"{name} is not marked as it is"] = 1.0
    assert not parameters
    return found


def check_whole_sequences(split: Decoder, whole: Decoder) -> float:
    """Reading a text in uneven pieces with a cache, on a model with or without sequence parallelism."""
    tokens = torch.randint(0, VOCABULARY, (2, 23), generator=torch.Generator().manual_seed(2))

    def read(model: Decoder) -> Tensor:
        cache = model.make_cache(2)
        return torch.cat([model.logits(piece, cache=cache) for piece in tokens.split((9, 13, 1), 1)], 1)

    wanted = read(whole)
    with split.whole_sequences():
        found = read(split)
    parts = [torch.empty_like(found) for _ in range(parallel_state.get_tensor_model_parallel_world_size())]
    dist.all_gather(parts, found.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return error(torch.cat(parts, -1), wanted)


class Memories:
    """What check_keys needs of a decoder: two memories, spread over this rank's memory group."""

    def __init__(self, ranks: topology.Topology) -> None:
        place = ranks.placement
        config = MemoryConfig(n_subkeys=8, k_dim=16, v_dim=8, topk=2)
        rank, ranks_of_it = place.memory_rank, place.memory_ranks
        self.states = {index: FastState(config, seed=index, rank=rank, ranks=ranks_of_it) for index in (2, 5)}

    def fast_states(self) -> Iterator[tuple[int, FastState]]:
        yield from self.states.items()


def check_digests(layout: ParallelConfig) -> list[str]:
    """What check_keys says of equal sub-keys, and of some whose last bit differs on the last rank."""
    ranks = topology.build_groups(layout)
    model, said = Memories(ranks), []
    for changed in (False, True):
        if changed and ranks.rank == ranks.world_size - 1:
            model.states[5].keys_H2nd.view(torch.int32).flatten()[-3] ^= 1
        try:
            check_keys(model, ranks)  # type: ignore[arg-type]
            said.append("equal")
        except RankFailedError as error:
            said.append(str(error))
    return said


def main() -> None:
    first = ParallelConfig(timeout_seconds=60)
    topology.initialize(first)
    found: dict[str, dict[str, float]] = {}
    for dtype in (torch.float64, torch.float32):
        for tied in (True, False):
            loss, whole = run(TorchBackend(0.2), tied, dtype)
            for tensor in (1, 2, 4):
                for divided in (False, True) if tensor > 1 else (False,):
                    layout = first.model_copy(update={"tensor": tensor, "sequence_parallel": divided})
                    placement = topology.build_groups(layout).placement
                    split_loss, split = run(megatron_backend(0.2, 1e-5, placement), tied, dtype)
                    errors = compare(loss, whole, split_loss, split)
                    errors["read in pieces"] = check_whole_sequences(split, whole)
                    assert split.sequence_parallel == divided
                    every: list[dict[str, float]] = [{}] * dist.get_world_size()
                    dist.all_gather_object(every, errors)
                    name = f"{dtype}, {'tied' if tied else 'untied'}, {tensor} ranks{', SP' if divided else ''}"
                    found[name] = {key: max(one[key] for one in every) for key in errors}
                    del split, placement
                    topology.end_groups()
    said: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(said, check_digests(first.model_copy(update={"tensor": 2})))
    rank = dist.get_rank()
    topology.shut_down()
    if rank == 0:
        print(json.dumps({"errors": found, "keys": said}), flush=True)


if __name__ == "__main__":
    main()
