"""Bad settings and bad inputs, each with one clear error."""

from typing import Any

import pytest
import torch

from megatron_fwpkm.memory import FastState, MemoryCache, MemoryConfig, MemoryConfigError, fast_memory
from tests.memory.support import make_inputs

CONFIG = MemoryConfig(n_subkeys=8, topk=3, k_dim=8, v_dim=5, chunk_size=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k_dim": 7}, "k_dim is 7; it must be even"),
        ({"topk": 9, "n_subkeys": 8}, "topk is 9 but n_subkeys is 8"),
        ({"chunk_size": 2, "lookahead": 2}, "chunk_size is 2 and lookahead 2"),
        ({"chunk_size": "whole"}, "chunk_size is 'whole'; allowed: 'sequence'"),
        ({"chunk_size": 0}, "chunk_size is 0; it must be at least 1"),
        ({"score_type": "cosine"}, "score_type is 'cosine'; allowed: 'idw', 'dot_product'"),
        ({"heads": 0}, "heads is 0; it must be at least 1"),
        ({"heads": 1.5}, "heads is 1.5; it must be of type int"),
        ({"heads": True}, "heads is True; it must be of type int"),
        ({"gradient_clip": 1}, "gradient_clip is 1; it must be of type bool"),
        ({"temperature": 0}, "temperature is 0; it must be at least 1e-06"),
        ({"temperature": float("nan")}, "temperature is nan; it must be finite"),
        ({"learning_rate": 10**400}, "it must be finite"),
        ({"n_subkeys": 10**12}, "n_subkeys is 1000000000000; it must be at most 1048576"),
        ({"v_dim": 1}, "v_dim is 1; a z-score needs 2 columns"),
        ({"learning_rate": 2.0, "weight_decay": 0.5}, "learning_rate \\* weight_decay is 1; it must be below 1"),
        ({"reset": "never"}, "reset is 'never'; allowed: 'carry', 'per_step', 'per_sequence'"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MemoryConfigError, match=message):
        MemoryConfig(**settings)


def test_description_has_every_field_on_one_line() -> None:
    lines = MemoryConfig.describe().splitlines()
    assert [line.split(" = ")[0] for line in lines] == list(MemoryConfig.__dataclass_fields__)
    assert all(line.endswith("]") and ";" in line for line in lines)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 6, 2, 8)}, r"query has shape \(2, 6, 2, 8\)"),
        ({"query": torch.zeros(2, 6, 8)}, r"query has shape \(2, 6, 8\)"),
        ({"target": torch.zeros(2, 6, 4)}, r"target has shape \(2, 6, 4\); expected \(2, 6, 5\)"),
        ({"gate": torch.zeros(2, 5)}, r"gate has shape \(2, 5\)"),
        ({"mask": torch.ones(2, 6)}, r"mask has dtype torch.float32; expected torch.bool"),
        ({"query": torch.zeros(2, 6, 1, 8, dtype=torch.int64)}, r"query has dtype torch.int64"),
    ],
)
def test_bad_inputs_are_named(change: dict[str, torch.Tensor], message: str) -> None:
    parts = dict(zip(("query", "target", "gate", "mask"), make_inputs(CONFIG, 2, 6, 0).tensors(), strict=True)) | change
    state = FastState(CONFIG)
    table = state.table_ND.clone()
    query, target, gate, mask = parts.values()
    assert query is not None and target is not None
    with pytest.raises(ValueError, match=message):
        fast_memory(query, target, gate, mask, state, CONFIG)
    with pytest.raises(ValueError, match=message):
        MemoryCache(state, 2)(query, target, gate, mask)
    assert torch.equal(table, state.table_ND)


def test_nan_is_found_on_request_before_anything_is_written() -> None:
    config = MemoryConfig(**{**CONFIG.__dict__, "check_finite": True})
    inputs = make_inputs(config, 2, 6, 0)
    inputs.target[1, 3, 2] = float("nan")
    state = FastState(config, dtype=torch.float64)
    table = state.table_ND.clone()
    with pytest.raises(ValueError, match=r"target holds NaN or infinity, first at \[1, 3, 2\]"):
        fast_memory(*inputs.tensors(), state, config)
    assert torch.equal(table, state.table_ND)


def test_nan_does_not_hang_or_crash_and_can_be_rolled_back() -> None:
    inputs = make_inputs(CONFIG, 2, 6, 0, dtype=torch.float32)
    inputs.query[0, 1] = float("nan")
    state = FastState(CONFIG)
    table, keys = state.table_ND.clone(), state.keys_H2nd.clone()
    state.begin_step()
    with torch.no_grad():
        fast_memory(*inputs.tensors(), state, CONFIG)
    assert not bool(torch.isfinite(state.table_ND).all())
    state.rollback_step()
    assert torch.equal(table, state.table_ND) and torch.equal(keys, state.keys_H2nd)


def test_bad_cache_options_are_named() -> None:
    state = FastState(CONFIG)
    with pytest.raises(ValueError, match="'aligned', 'official'"):
        MemoryCache(state, 1, mode="exact")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'per_sequence', 'shared'"):
        MemoryCache(state, 1, memory="one")  # type: ignore[arg-type]
