"""Megatron's layers against plain torch layers, in one process; prints the largest differences as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from megatron_fwpkm.config import load_train_config
from megatron_fwpkm.model.decoder import Decoder
from megatron_fwpkm.parallel import topology
from megatron_fwpkm.parallel.backend import TorchBackend, megatron_backend
from megatron_fwpkm.parallel.settings import ParallelConfig


def main() -> None:
    config = load_train_config(Path(sys.argv[1]))
    topology.initialize(ParallelConfig(timeout_seconds=60))
    tokens = torch.randint(0, 320, (2, 48), generator=torch.Generator().manual_seed(1))
    results = []
    for backend in (TorchBackend(), megatron_backend(0.02, 1e-5)):
        model = Decoder(config.model, 320, backend, seed=3)
        loss = model(tokens, tokens.roll(-1, 1)).mean()
        loss.backward()
        gradients = {name: torch.as_tensor(parameter.grad) for name, parameter in model.named_parameters()}
        results.append((loss.detach(), dict(model.named_parameters()), gradients))
    (loss, weights, gradients), (other_loss, other_weights, other_gradients) = results
    found = {
        "names": sorted(weights) == sorted(other_weights),
        "weights": all(torch.equal(weight, other_weights[name]) for name, weight in weights.items()),
        "loss": (loss - other_loss).abs().item(),
        "gradient": max((gradient - other_gradients[name]).abs().max().item() for name, gradient in gradients.items()),
    }
    topology.shut_down()
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
