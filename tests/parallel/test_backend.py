"""Which library's layers and kernels are chosen where."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from megatron_fwpkm.model.delta_rule import chunked_delta_rule, fla_delta_rule
from megatron_fwpkm.parallel import backend


@pytest.mark.parametrize(
    ("cuda", "found", "expected"),
    [
        (False, True, chunked_delta_rule),
        (True, False, chunked_delta_rule),
        (True, True, fla_delta_rule),
    ],
)
def test_the_gpu_kernel_is_for_gpus_that_have_it(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, found: bool, expected: object
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace() if found else None)
    assert backend.choose_delta_rule() is expected
    assert backend.TorchBackend().delta_rule() is expected


@pytest.mark.skipif(backend.installed("transformer_engine"), reason="Transformer Engine is installed")
@pytest.mark.filterwarnings("ignore:Transformer Engine and Apex are not installed")
def test_transformer_engine_layers_say_that_it_is_missing() -> None:
    with pytest.raises(ImportError, match="gpu extra"):
        importlib.import_module("megatron_fwpkm.parallel.transformer_engine_layers")


def test_installed() -> None:
    assert backend.installed("torch") and not backend.installed("no_such_package_anywhere")


def test_split_parameters_and_layers_follow_the_default_device() -> None:
    plain = backend.TorchBackend()
    with torch.device("meta"):
        layers = (plain.share_linear(4, 3), plain.embedding(5, 4), plain.norm(4), plain.share_norm(4))
        tensors = [p for layer in layers for p in layer.parameters()]
        tensors.append(plain.split_parameter((4, 2), torch.nn.init.ones_))
    assert all(tensor.is_meta for tensor in tensors)
    assert torch.equal(plain.split_parameter((4, 2), torch.nn.init.ones_), torch.ones(4, 2))
