"""Replay of reference cases of whole models: `.json`, `.safetensors` (official weights) and `.npz` (what came out).

The format is that of `tests/golden_model`. A case with `prefill` runs through inference caches; others make a forward
and a backward pass, and a second forward pass with the memory that the first has left.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_fwpkm.convert.official_config import decoder_config
from megatron_fwpkm.convert.official_names import load_official, official_gradients
from megatron_fwpkm.data.batch import IGNORED_LABEL
from megatron_fwpkm.memory import CacheTrace, MemoryTrace
from megatron_fwpkm.memory.golden import (
    FLOAT32_FLOOR,
    FLOAT64_TOLERANCE,
    ZERO_TOLERANCE,
    ArrayResult,
    CaseResult,
    GoldenCaseError,
    compare_arrays,
)
from megatron_fwpkm.model.decoder import Decoder
from megatron_fwpkm.parallel.backend import Backend, TorchBackend

STORED_FLOAT32_TOLERANCE = 1e-7
"""For a float64 run against an array that is stored in float32."""
STATISTICS_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}
"""Of ratios that the official code computes in float32."""

_INPUTS = {"input_ids", "labels", "attention_mask", "position_ids"}
_STATISTICS = {
    "coverage": "coverage_ratio",
    "collision_ratio": "collision_ratio",
    "kl_to_uniform": "kld",
    "addressing_loss": "addressing_loss/me",
}


def is_model_case(description: dict[str, Any]) -> bool:
    """Whether a case's .json describes a whole model (a layer case has `module` instead)."""
    return "config" in description and "module" not in description


def replay_model_case(
    path: Path,
    dtype: torch.dtype = torch.float64,
    make_backend: Callable[[float, float], Backend] = TorchBackend,
) -> CaseResult:
    """Run one case and compare every array that it holds.

    `make_backend` takes the initial standard deviation and the norms' epsilon.

    Raises:
        GoldenCaseError: the case can't be read.
    """
    try:
        case = _ModelCase(path, dtype, make_backend)
        if "prefill" in case.description["case"]:
            _replay_cached(case)
        else:
            _replay_training(case)
        case.finish()
    except Exception as error:  # whatever is wrong with a file must not look like a wrong result
        raise GoldenCaseError(f"{path}: not a usable model case ({type(error).__name__}: {error})") from error
    return case.result


class _ModelCase:
    def __init__(self, path: Path, dtype: torch.dtype, make_backend: Callable[[float, float], Backend]) -> None:
        from safetensors.torch import load_file

        self.description = json.loads(path.read_text())
        with np.load(path.with_suffix(".npz")) as arrays:
            self.arrays = {name: torch.from_numpy(arrays[name].copy()) for name in arrays.files}
        missing = sorted(set(self.description["arrays"]) - set(self.arrays))
        if missing:
            raise ValueError(f"the .npz lacks {', '.join(missing)}, which the .json names")
        self.dtype = dtype
        self.result = CaseResult(self.description["name"])
        self.compared: set[str] = set()
        config, vocab_size = decoder_config(self.description["config"])
        config = dataclasses.replace(config, memory=dataclasses.replace(config.memory, key_gradient="official"))
        backend = make_backend(config.initial_std, config.norm_epsilon)
        self.model = Decoder(config, vocab_size, backend, seed=0, fast_dtype=dtype).to(dtype)
        load_official(self.model, load_file(path.with_suffix(".safetensors")))
        self.tokens = self.arrays["input_ids"].long()
        mask = self.arrays.get("attention_mask")
        self.mask = None if mask is None else mask > 0
        positions = self.arrays.get("position_ids")
        self.positions = None if positions is None else positions.long()
        self.is_real = torch.ones_like(self.tokens, dtype=torch.bool) if self.mask is None else self.mask

    def tolerance(self, name: str) -> float:
        if self.dtype == torch.float64:
            stored = self.arrays[name].dtype
            return FLOAT64_TOLERANCE if stored == torch.float64 else STORED_FLOAT32_TOLERANCE
        is_gradient = name.startswith(("grad/", "gradnorm/"))
        recorded = self.description["official_float32_rel_err"].get("max_over_grads" if is_gradient else name, 0.0)
        return max(4 * recorded, FLOAT32_FLOOR)

    def compare(self, name: str, found: Tensor | None, real_only: bool = False) -> None:
        """Compare with the case's array, if it has one of that name. Logits of padding are what they are."""
        if name not in self.arrays:
            return
        self.compared.add(name)
        wanted = self.arrays[name]
        if real_only and found is not None and found.shape == wanted.shape:
            found, wanted = found[self.is_real], wanted[self.is_real]
        self.result.arrays.append(compare_arrays(name, found, wanted, self.tolerance(name), ZERO_TOLERANCE[self.dtype]))

    def compare_number(self, name: str, found: float, wanted: float, tolerance: float) -> None:
        error = abs(found - wanted) / max(abs(wanted), 1e-12)
        self.result.arrays.append(ArrayResult(name, error, tolerance))

    def compare_state(self, index: int, keys: Tensor, values: Tensor) -> None:
        self.compare(f"layer{index}.keys_final", keys.flatten(0, -2))
        self.compare(f"layer{index}.values_final", values)

    def finish(self) -> None:
        """An array that nothing was compared with fails: the case holds more than what was run."""
        for name in sorted(set(self.arrays) - self.compared - _INPUTS):
            self.result.arrays.append(ArrayResult(f"{name} (never computed)", float("inf"), 0.0))


def _replay_training(case: _ModelCase) -> None:
    """Forward, loss, memory, statistics, backward, and a forward pass that starts from the memory left."""
    model = case.model.train()
    traces = []
    for _, layer in model.memory_layers():
        layer.trace = MemoryTrace()
        traces.append(layer.trace)
    logits = model.logits(case.tokens, positions_BT=case.positions, mask_BT=case.mask)
    labels = case.arrays["labels"].long()
    loss = model.cross_entropy(logits.clone(), labels).sum() / (labels != IGNORED_LABEL).sum()
    case.compare("logits", logits.detach(), real_only=True)
    case.compare("loss", loss.detach())
    if traces:
        case.compare("fwpkm_losses", torch.stack([_present(trace.losses) for trace in traces], 2))
        gates = torch.stack([_present(trace.gate_BT).detach() for trace in traces], 2)
        case.compare("fwpkm_gates", gates.unsqueeze(-1))
    for index, state in model.fast_states():
        case.compare_state(index, state.keys_H2nd, state.values_ND())
    _compare_statistics(case)
    loss.backward()
    gradients = official_gradients(model)
    missing = sorted(name for name in gradients if f"gradnorm/{name}" not in case.arrays)
    if missing:
        raise ValueError(f"the .npz has no gradient norm of {', '.join(missing)}")
    for name, gradient in gradients.items():
        case.compare(f"grad/{name}", gradient)
        case.compare(f"gradnorm/{name}", gradient.norm())
    with torch.no_grad():
        again = model.logits(case.tokens, positions_BT=case.positions, mask_BT=case.mask)
    case.compare("logits_second_forward_memory_carried", again, real_only=True)


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _compare_statistics(case: _ModelCase) -> None:
    logged = case.description.get("addr_stats", [])
    for (index, layer), wanted in zip(case.model.memory_layers(), logged, strict=True):
        found = layer.statistics()
        for ours, theirs in _STATISTICS.items():
            name = f"statistics{index}.{ours}"
            case.compare_number(name, float(found[ours]), wanted[theirs], STATISTICS_TOLERANCE[case.dtype])


@torch.no_grad()
def _replay_cached(case: _ModelCase) -> None:
    """Prefill, then single tokens, with memories that are written as the official code does."""
    model = case.model.eval()
    cache = model.make_cache(case.tokens.shape[0], mode="official", memory="shared")
    memories = {index: cache.layers[index].memory for index, _ in model.memory_layers()}
    updates = {seen: layers for seen, layers in case.description.get("updates_after", [])}
    logits, start = [], 0
    prefill = case.description["case"]["prefill"]
    for length in [prefill] + [1] * (case.tokens.shape[1] - prefill):
        piece = slice(start, start + length)
        for memory in memories.values():
            assert memory is not None
            memory.trace = CacheTrace()
        positions, mask = (None if t is None else t[:, piece] for t in (case.positions, case.mask))
        logits.append(model.logits(case.tokens[:, piece], positions_BT=positions, mask_BT=mask, cache=cache))
        start += length
        wrote = [index for index, memory in memories.items() if memory and memory.trace and memory.trace.losses]
        if start in updates and wrote != updates[start]:
            case.result.arrays.append(ArrayResult(f"statistics.wrote_after_{start}", 1.0, 0.0))
    case.compare("logits", torch.cat(logits, 1), real_only=True)
    for index, memory in memories.items():
        assert memory is not None
        case.compare_state(index, memory.view.keys_MH2nd, memory.view.values_ND())
