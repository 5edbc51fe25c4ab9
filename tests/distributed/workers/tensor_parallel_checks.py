"""A hybrid model over two tensor-parallel ranks against the same in one process; prints the largest differences."""

from __future__ import annotations

import json

import torch
import torch.distributed
from megatron.core import parallel_state
from torch import Tensor

from megatron_fwpkm.memory import MemoryConfig, PKMConfig
from megatron_fwpkm.model.decoder import Decoder
from megatron_fwpkm.model.settings import MIXERS, DecoderConfig, DeltaNetConfig
from megatron_fwpkm.parallel import topology
from megatron_fwpkm.parallel.backend import Backend, TorchBackend, megatron_backend
from megatron_fwpkm.parallel.settings import ParallelConfig

CONFIG = DecoderConfig(
    hidden_size=32,
    layers=3,
    mixers=MIXERS,
    attention_heads=4,
    key_value_heads=2,
    head_dim=8,
    mlp_size=48,
    window=8,
    delta_net=DeltaNetConfig(key_heads=2, value_heads=4, key_head_dim=8, value_head_dim=6),
    memory=MemoryConfig(topk=4, n_subkeys=8, k_dim=16, v_dim=16, chunk_size=8),
    memory_layers=(1,),
    pkm=PKMConfig(heads=2, topk=4, n_subkeys=8, k_dim=16, v_dim=12),
    pkm_layers=(2,),
    tied_embeddings=False,
)


def run(backend: Backend) -> tuple[Tensor, Decoder]:
    tokens = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(1))
    labels = tokens.roll(-1, 1)
    labels[0, 3:9] = -100
    model = Decoder(CONFIG, 64, backend, seed=3)
    loss = model(tokens, labels).mean()
    loss.backward()
    return loss.detach(), model


def share(whole: Tensor, part: Tensor) -> Tensor:
    """The part of a whole tensor that a rank's tensor of another shape stands for."""
    for dim in range(whole.dim()):
        if whole.shape[dim] != part.shape[dim]:
            return whole.chunk(2, dim)[parallel_state.get_tensor_model_parallel_rank()]
    return whole


def main() -> None:
    topology.initialize(ParallelConfig(tensor=2, timeout_seconds=60))
    loss, model = run(TorchBackend(0.2))
    split_loss, split = run(megatron_backend(0.2, 1e-5))
    whole, differences, split_names = dict(model.named_parameters()), {"weight": 0.0, "gradient": 0.0}, []
    for name, part in split.named_parameters():
        other = whole.pop(name)
        assert part.grad is not None and other.grad is not None, name
        gradient, wanted = part.grad.to_dense(), other.grad.to_dense()
        differences["weight"] = max(differences["weight"], float((part - share(other, part)).detach().abs().max()))
        error = float((gradient - share(wanted, gradient)).abs().max() / wanted.abs().max())
        differences["gradient"] = max(differences["gradient"], error)
        if part.shape != other.shape:
            split_names.append(name)
    assert not whole
    found = torch.tensor([*differences.values(), float((loss - split_loss).abs())])
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    rank = torch.distributed.get_rank()
    topology.shut_down()
    if rank == 0:
        weight, gradient, difference = found.tolist()
        print(
            json.dumps({"weight": weight, "gradient": gradient, "loss": difference, "split": split_names}), flush=True
        )


if __name__ == "__main__":
    main()
