"""Replay of reference cases: a folder of `.json` (what a case is) and `.npz` (its arrays) against this memory.

The format, as the cases of `tests/golden` have it: `module` holds the layer's settings in the names of the paper's
code, `run` the shapes and calls; arrays without a call's suffix belong to the first call, `*_call1` to the second.
Cached cases have the state after each writing call (`keys_after_7`) and the losses of its writes (`losses_7`).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_fwpkm.memory.cache import CacheTrace, MemoryCache
from megatron_fwpkm.memory.config import MemoryConfig
from megatron_fwpkm.memory.fast_state import FastState, MemoryView
from megatron_fwpkm.memory.functional import MemoryTrace, fast_memory

FLOAT64_TOLERANCE = 1e-9
FLOAT32_FLOOR = 1e-6
BFLOAT16_TOLERANCE = 1e-2
ZERO_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


class GoldenCaseError(ValueError):
    """A case can't be read; the message names the file and what is missing."""


@dataclass
class ArrayResult:
    """Error of one array: max|a - b| / max|b|, absolute where the reference is exactly zero."""

    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance (not so for NaN)."""
        return self.error <= self.tolerance


@dataclass
class CaseResult:
    """All arrays of one case."""

    name: str
    arrays: list[ArrayResult] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every array is within its tolerance, and there is at least one."""
        return bool(self.arrays) and all(array.passed for array in self.arrays)


def compare_arrays(
    name: str, found: Tensor | None, wanted: Tensor, tolerance: float, zero_tolerance: float
) -> ArrayResult:
    """Error of one array: integers must be equal; where the reference is exactly zero the error is absolute."""
    if found is None or found.shape != wanted.shape:
        return ArrayResult(name, float("inf"), 0.0)
    if not wanted.is_floating_point():
        return ArrayResult(name, float((found != wanted).sum()), 0.0)
    size = float(wanted.abs().max()) if wanted.numel() else 0.0
    error = float((found.double() - wanted.double()).abs().max()) if wanted.numel() else 0.0
    if size == 0:
        return ArrayResult(name, error, zero_tolerance)
    return ArrayResult(name, error / size, tolerance)


_MODULE_SETTINGS = {
    *("mem_heads", "mem_topk", "mem_n_subkeys", "mem_k_dim", "mem_v_dim", "lookahead", "qk_score_type"),
    *("score_nonlinear", "score_temperature", "optimizer_type", "learning_rate", "weight_decay", "loss_type"),
    *("mem_grad_to_values_only", "grad_clip", "addr_loss", "addr_loss_weight", "fp32_fw"),
}
# Arrays that are inputs (with or without a call's suffix) and need no comparison; grad_norms are norms of the paper's
# inner gradients before scaling, which the final keys and values already determine.
_INPUTS = {"keys0", "values0", "q", "ref_v", "gates", "loss_mask", "cot", "grad_norms"}


def memory_config(module: dict[str, Any], chunk_size: int, **overrides: Any) -> MemoryConfig:
    """Settings in the names of the paper's code to a `MemoryConfig`.

    Raises:
        GoldenCaseError: a setting that this memory does not have (another inner optimizer or loss).
    """
    unknown = sorted(set(module) - _MODULE_SETTINGS)
    if unknown:
        raise GoldenCaseError(f"unknown settings {', '.join(unknown)}; known are {', '.join(sorted(_MODULE_SETTINGS))}")
    for name, only in (("optimizer_type", "sgd"), ("loss_type", "mse")):
        if module.get(name, only) != only:
            raise GoldenCaseError(f"{name} is {module[name]!r}; only {only!r} is known")
    if module.get("addr_loss") not in ("me", None):
        raise GoldenCaseError(f"addr_loss is {module['addr_loss']!r}; only 'me' and null are known")
    settings: dict[str, Any] = {
        "heads": module["mem_heads"],
        "topk": module["mem_topk"],
        "n_subkeys": module["mem_n_subkeys"],
        "k_dim": module["mem_k_dim"],
        "v_dim": module["mem_v_dim"],
        "chunk_size": chunk_size,
        "lookahead": module["lookahead"],
        "score_type": module["qk_score_type"],
        "score_nonlinearity": module["score_nonlinear"],
        "temperature": module["score_temperature"],
        "learning_rate": module["learning_rate"],
        "weight_decay": module["weight_decay"],
        "gradient_clip": module["grad_clip"],
        "addressing_loss": "none" if module["addr_loss"] is None else "marginal_entropy",
        "addressing_loss_weight": module["addr_loss_weight"],
        "values_only": module["mem_grad_to_values_only"],
        "key_gradient": "official",
        "cache_mode": "official",
        "cache_memory": "shared",
    }
    return MemoryConfig(**(settings | overrides))


CaseInputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""Query, target, gate and mask of one call."""


class Replay:
    """How the calls of a case are made: here on one rank with the whole memory."""

    def make_state(self, config: MemoryConfig, dtype: torch.dtype) -> FastState:
        """The fast state."""
        return FastState(config, dtype=dtype)

    def own_values(self, state: FastState, values_ND: Tensor) -> Tensor:
        """The state's rows of a whole table."""
        return values_ND

    def whole_values(self, state: FastState, values_ND: Tensor) -> Tensor:
        """The inverse of `own_values`."""
        return values_ND

    def make_cache(self, state: FastState, batch: int) -> MemoryCache:
        """A cache over the state."""
        return MemoryCache(state, batch)

    def call(self, inputs: CaseInputs, view: MemoryView, config: MemoryConfig, trace: MemoryTrace) -> Tensor:
        """One call of the training path."""
        return fast_memory(*inputs, view, config, trace=trace)


class _Case:
    def __init__(self, path: Path, dtype: torch.dtype, replay: Replay) -> None:
        self.replay = replay
        self.description = json.loads(path.read_text())
        with np.load(path.with_suffix(".npz")) as arrays:
            self.arrays = {name: torch.from_numpy(arrays[name].copy()) for name in arrays.files}
        declared = set(self.description.get("arrays", self.arrays))
        if declared != set(self.arrays):
            differing = ", ".join(sorted(declared ^ set(self.arrays)))
            raise GoldenCaseError(f"the arrays of the .npz are not those that the .json names: {differing}")
        self.run = self.description["run"]
        self.config = memory_config(self.description["module"], self.run["chunk_size"])
        self.compared: set[str] = set()
        self.bfloat16 = self.run.get("dtype") == "bf16"
        self.dtype = torch.float32 if self.bfloat16 else dtype
        self.result = CaseResult(self.description["name"])
        self.state = replay.make_state(self.config, self.dtype)
        keys = self.floats("keys0").view(self.state.keys_H2nd.shape)
        self.state.replace(keys, replay.own_values(self.state, self.floats("values0")))

    def floats(self, name: str) -> Tensor:
        return self.arrays[name].to(self.dtype)

    def optional(self, name: str) -> Tensor | None:
        return self.floats(name) if name in self.arrays else None

    def inputs(self, suffix: str) -> CaseInputs:
        query = self.floats("q" + suffix).unflatten(-1, (self.config.heads, -1))
        mask = self.arrays.get("loss_mask" + suffix)
        return query, self.floats("ref_v" + suffix), self.optional("gates" + suffix), None if mask is None else mask > 0

    def tolerance(self, name: str) -> float:
        if self.bfloat16:
            return BFLOAT16_TOLERANCE
        if self.dtype == torch.float64:
            return FLOAT64_TOLERANCE
        recorded = self.description["official_float32_rel_err"].get(name, 0.0)
        return max(4 * recorded, FLOAT32_FLOOR)

    def compare(self, name: str, found: Tensor | None) -> None:
        """Compare with the case's array, if it has one of that name."""
        if name not in self.arrays:
            return
        self.compared.add(name)
        zero_tolerance = ZERO_TOLERANCE[self.dtype]
        self.result.arrays.append(compare_arrays(name, found, self.arrays[name], self.tolerance(name), zero_tolerance))

    def finish(self) -> None:
        """An array that nothing was compared with fails: the case holds more than what was run."""
        for name in sorted(set(self.arrays) - self.compared):
            if re.sub(r"_call\d+$", "", name) not in _INPUTS:
                self.result.arrays.append(ArrayResult(f"{name} (never computed)", float("inf"), 0.0))

    def compare_state(self, keys_name: str, values_name: str, keys: Tensor, values: Tensor) -> None:
        self.compare(keys_name, keys.reshape(self.arrays["keys0"].shape))
        self.compare(values_name, values)


def replay_case(path: Path, dtype: torch.dtype = torch.float64, replay: Replay | None = None) -> CaseResult:
    """Run one case and compare every array that it holds; `replay` makes the calls (None: on one rank).

    Raises:
        GoldenCaseError: the case can't be read.
    """
    try:
        case = _Case(path, dtype, replay or Replay())
        if "calls" in case.run:
            _replay_cached(case)
        else:
            for call in range(case.run.get("ncalls", 1)):
                _replay_call(case, "" if call == 0 else f"_call{call}")
        case.finish()
    except Exception as error:  # whatever is wrong with a file must not look like a wrong result
        raise GoldenCaseError(f"{path}: not a usable layer case ({type(error).__name__}: {error})") from error
    return case.result


def _replay_call(case: _Case, suffix: str) -> None:
    """One call of the training path; the state carries over to the next."""
    query, target, gate, mask = case.inputs(suffix)
    train = case.run.get("train", True)
    leaves = {"d_q": query, "d_ref_v": target, "d_gates": gate}
    if train:
        for leaf in leaves.values():
            if leaf is not None:
                leaf.requires_grad_()
    trace = MemoryTrace()
    output = case.replay.call((query, target, gate, mask), case.state, case.config, trace)
    case.compare("output" + suffix, output.detach())
    case.compare("indices" + suffix, trace.slots_BTHK)
    case.compare("scores" + suffix, trace.weights_BTHK)
    case.compare("losses" + suffix, trace.losses)
    if case.config.has_addressing_loss:
        case.compare("addr_loss" + suffix, trace.addressing_loss)
    values_ND = case.replay.whole_values(case.state, case.state.values_ND())
    case.compare_state("keys_final" + suffix, "values_final" + suffix, case.state.keys_H2nd, values_ND)
    if train:
        output.backward(case.floats("cot" + suffix))
        for name, leaf in leaves.items():
            if leaf is not None:
                assert leaf.grad is not None
                case.compare(name + suffix, leaf.grad.flatten(2) if name == "d_q" else leaf.grad)
        memory = trace.memory_gradient
        assert memory is not None
        case.compare("d_keys0" + suffix, memory.keys_MH2nd.reshape(case.arrays["keys0"].shape))
        rows_ND = memory.values_ND(case.state.num_slots)
        case.compare("d_values0" + suffix, case.replay.whole_values(case.state, rows_ND))
    if case.bfloat16:  # that code keeps the memory in the parameters' dtype between calls
        case.state.replace(case.state.keys_H2nd.bfloat16().float(), case.state.values_ND().bfloat16().float())


def _replay_cached(case: _Case) -> None:
    """Consecutive calls of the cached path."""
    query, target, gate, mask = case.inputs("")
    cache = case.replay.make_cache(case.state, query.shape[0])
    outputs, slots, weights, start = [], [], [], 0
    for call, length in enumerate(case.run["calls"]):
        piece = slice(start, start + length)
        cache.trace = trace = CacheTrace()
        part = (None if t is None else t[:, piece] for t in (query, target, gate, mask))
        outputs.append(cache(*part))  # type: ignore[arg-type]
        assert trace.slots_BTHK is not None and trace.weights_BTHK is not None
        slots.append(trace.slots_BTHK)
        weights.append(trace.weights_BTHK)
        start += length
        wrote = bool(trace.losses)
        logged = next((entry for entry in case.description.get("call_log", []) if entry["call"] == call), None)
        if logged is not None and logged["updated"] != wrote:
            case.result.arrays.append(ArrayResult(f"wrote_{call}", 1.0, 0.0))
        if wrote:
            case.compare(f"losses_{call}", torch.cat(trace.losses, 1))
            case.compare_state(
                f"keys_after_{call}", f"values_after_{call}", cache.view.keys_MH2nd, cache.view.values_ND()
            )
            if logged is not None and logged["addr_loss"] is not None:
                name = f"addr_loss_{call}"
                case.arrays[name] = torch.tensor(logged["addr_loss"], dtype=torch.float64)
                case.compare(name, torch.stack(trace.addressing_losses).mean())
    case.compare("output", torch.cat(outputs, 1))
    case.compare("indices", torch.cat(slots, 1))
    case.compare("scores", torch.cat(weights, 1))
    case.compare_state("keys_final", "values_final", cache.view.keys_MH2nd, cache.view.values_ND())


def find_cases(folder: Path) -> list[Path]:
    """The cases of a folder, sorted by name. Raises GoldenCaseError when there are none."""
    if not folder.is_dir():
        raise GoldenCaseError(f"{folder} is not a folder of cases")
    paths = sorted(folder.glob("*.json"))
    for path in paths:
        if not path.with_suffix(".npz").is_file():
            raise GoldenCaseError(f"{path} has no {path.stem}.npz beside it")
    if not paths:
        raise GoldenCaseError(f"{folder} holds no case (a .json with an .npz of the same name)")
    return paths
