"""The FwPKM and PKM layers inside the paper's whole models: logits, gradients, memory and statistics of its code."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.memory.paper_model import PaperModel

CASES = Path(__file__).parents[1] / "golden_model"


def load(name: str) -> tuple[PaperModel, dict[str, Tensor], dict]:
    description = json.loads((CASES / f"{name}.json").read_text())
    with np.load(CASES / f"{name}.npz") as arrays:
        tensors = {key: torch.from_numpy(arrays[key].copy()) for key in arrays.files}
    return PaperModel(description["config"], load_file(CASES / f"{name}.safetensors")), tensors, description


def error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("name", ["0_mix_train", "1_attn_fw_leftpad"])
def test_training_forward_and_backward(name: str) -> None:
    model, case, description = load(name)
    mask, positions = case.get("attention_mask"), case.get("position_ids")
    logits = model.logits(case["input_ids"].long(), mask, positions)
    # Logits of padding are what they are; tokens that count must agree.
    real = torch.ones_like(case["input_ids"], dtype=torch.bool) if mask is None else mask > 0
    assert error(logits[real].detach(), case["logits"][real]) < 1e-9
    labels = case["labels"].long().flatten()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, ignore_index=-100)
    assert abs(float(loss.detach()) - float(case["loss"])) < 1e-9
    for index, layer in model.memory.items():
        keys, values = layer.fast_state.keys_H2nd.flatten(0, 2), layer.fast_state.values_ND()
        assert error(keys, case[f"layer{index}.keys_final"]) < 1e-9
        assert error(values, case[f"layer{index}.values_final"]) < 1e-9
    for layer, wanted in zip(model.memory.values(), description["addr_stats"], strict=True):
        found = layer.statistics()
        assert float(found["coverage"]) == pytest.approx(wanted["coverage_ratio"], rel=1e-6)
        assert float(found["collision_ratio"]) == pytest.approx(wanted["collision_ratio"], rel=1e-6)
        assert float(found["kl_to_uniform"]) == pytest.approx(wanted["kld"], rel=1e-6)
        assert float(found["addressing_loss"]) == pytest.approx(wanted["addressing_loss/me"], rel=1e-9)
    loss.backward()
    compared = _compare_gradients(model, case)
    again = model.logits(case["input_ids"].long(), mask, positions).detach()
    assert error(again[real], case["logits_second_forward_memory_carried"][real]) < 1e-9
    assert compared >= 100


def _compare_gradients(model: PaperModel, case: dict[str, Tensor]) -> int:
    gradients, compared = model.gradients(), 0
    for key, wanted in case.items():
        kind, _, name = key.partition("/")
        if kind not in ("grad", "gradnorm"):
            continue
        found = gradients[name]
        found = found.norm() if wanted.dim() == 0 else found
        tolerance = 1e-9 if wanted.dtype == torch.float64 else 1e-7  # large gradients are stored in float32
        assert float((found - wanted).abs().max()) <= tolerance * max(float(wanted.abs().max()), 1e-6), (kind, name)
        compared += 1
    return compared


def test_prefill_and_decode_through_the_cached_path() -> None:
    model, case, description = load("2_cache_decode_eval")
    ids = case["input_ids"].long()
    prefill = description["case"]["prefill"]
    with torch.no_grad():
        logits = model.logits(ids, None, None, calls=[prefill] + [1] * (ids.shape[1] - prefill))
    assert error(logits, case["logits"]) < 1e-9
    view = model.caches[2].view
    assert error(view.keys_MH2nd.flatten(0, 3), case["layer2.keys_final"]) < 1e-9
    assert error(view.values_ND(), case["layer2.values_final"]) < 1e-9
