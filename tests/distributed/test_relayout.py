"""A checkpoint of any layout goes on in any other as if nothing had been."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from megatron_fwpkm.checkpoint.files import TENSORS
from megatron_fwpkm.checkpoint.parts import fast_name, memory_pieces
from megatron_fwpkm.checkpoint.pieces import Staging
from megatron_fwpkm.checkpoint.tensors import save_tensors
from megatron_fwpkm.checkpoint.whole_model import read_decoder
from megatron_fwpkm.convert.official_names import official_weights
from megatron_fwpkm.convert.weight_files import write_weights
from megatron_fwpkm.model.decoder import Decoder
from megatron_fwpkm.parallel.backend import TorchBackend
from tests.checkpoints import differing, whole_tensors
from tests.distributed.cells import Cell
from tests.distributed.workers import equivalence
from tests.distributed.workers.relayout_checks import Leg, with_table

if TYPE_CHECKING:
    from .conftest import TinyJob

pytestmark = pytest.mark.distributed
TOLERANCE = 1e-5
BEFORE, AFTER = (1, 2), (3, 4, 5)

# The first layout of a chain trains two steps, saves and goes on; each other one loads what the one before has saved,
# saves it again, and trains the same three steps.
CHAINS: dict[str, list[Cell]] = {
    "tensor, data and pipeline": [
        Cell(tensor=2, sequence_parallel=True),
        Cell(replicas=2, memory_replicas="synced"),
        Cell(tensor=2, pipeline=2),
        Cell(tensor=4),
    ],
    "stages of ZeRO": [Cell(replicas=2, zero=zero) for zero in (1, 3, 0, 2)],
    "slots and columns": [
        Cell(tensor=2),
        Cell(tensor=2, sharding="columns", sequence_parallel=True),
        Cell(tensor=2, pipeline=2),
    ],
    "ranks of a memory": [
        Cell(tensor=2, accumulation=2),
        Cell(tensor=2, replicas=2, memory_replicas="synced", zero=3, accumulation=2),
        Cell(accumulation=2, tied=True),
    ],
}
SEEDS = {"tensor, data and pipeline": 1, "stages of ZeRO": 1, "slots and columns": 1, "ranks of a memory": 1}


def run_legs(job: TinyJob, legs: list[Leg]) -> dict[str, Any]:
    """What each leg found; neighbours with as many processes share a start."""
    found: dict[str, Any] = {}
    while legs:
        processes = legs[0].cell.processes
        count = next((place for place, leg in enumerate(legs) if leg.cell.processes != processes), len(legs))
        path = job.folder / "legs.json"
        path.write_text(json.dumps([dataclasses.asdict(leg) for leg in legs[:count]]))
        found |= job.worker("relayout_checks.py", str(path), processes=processes)
        legs = legs[count:]
    return found


def legs_of(name: str, folder: Path) -> list[Leg]:
    cells = [dataclasses.replace(cell, seed=SEEDS[name]) for cell in CHAINS[name]]
    streams = max(cell.replicas for cell in cells)
    legs = []
    for number, cell in enumerate(cells):
        begin: dict[str, Any] = {"come_from": str(number - 1)} if number else {"steps": BEFORE}
        legs.append(Leg(str(number), cell, str(folder), more_steps=AFTER, streams=streams, **begin))
    return legs


@pytest.mark.parametrize("name", CHAINS)
def test_training_goes_on_in_another_layout(tiny_job: TinyJob, name: str) -> None:
    found = run_legs(tiny_job, legs_of(name, tiny_job.folder / "chain"))
    wanted = found["0"]["losses"][len(BEFORE) :]
    saved = whole_tensors(Path(found["0"]["checkpoint"]))
    assert len(saved) > 100 and all(bool(torch.isfinite(tensor).all()) for tensor in saved.values())
    for number, leg in found.items():
        errors = [abs(a - b) / abs(b) for a, b in zip(leg["losses"][-len(AFTER) :], wanted, strict=True)]
        assert max(errors) < TOLERANCE, (number, errors)
        assert leg["notes"] == []
        assert differing(saved, whole_tensors(Path(leg["checkpoint"]))) == []
    exports = [exported(CHAINS[name][int(number)], Path(leg["checkpoint"])) for number, leg in found.items()]
    assert len(exports[0]) > 100_000 and all(export == exports[0] for export in exports)


def exported(cell: Cell, checkpoint: Path) -> bytes:
    """The weights' file of the checkpoint's export."""
    config = with_table(equivalence.model_config(cell))
    model = read_decoder(checkpoint, config, TorchBackend(), seed=0)
    write_weights(checkpoint.parent, official_weights(model), "5GB", lambda num_bytes: None)
    return (checkpoint.parent / "model.safetensors").read_bytes()


def memory_of(tensors: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """Sub-keys and true values of one memory in every block."""
    prefix = f"fast_state/memory_{number:05d}/"
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    blocks = sorted({name.split("/")[0] for name in own})
    values = {f"{block}/values": own[f"{block}/values.by_slot"] * own[f"{block}/scale"].float() for block in blocks}
    return {**values, **{f"{block}/keys": own[f"{block}/keys"] for block in blocks}}


def mean_of(*memories: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.stack([memory[name] for memory in memories]).mean(0) for name in memories[0]}


def test_memories_of_independent_replicas_follow_the_policy(tiny_job: TinyJob) -> None:
    """Two replicas become one (in two layouts, which then train alike), and one becomes two."""
    folder, seed = str(tiny_job.folder / "chain"), 3
    two, one, split = (Cell(replicas=2, seed=seed), Cell(seed=seed), Cell(tensor=2, pipeline=2, seed=seed))
    begin = Leg("begin", two, folder, steps=BEFORE, streams=2)
    common: dict[str, Any] = {"folder": folder, "come_from": "begin", "more_steps": AFTER, "streams": 2}
    policies = ("keep", "first", "average", "reset")
    found = run_legs(tiny_job, [begin])
    found |= run_legs(tiny_job, [Leg(f"one {policy}", one, memories=policy, **common) for policy in policies])
    found |= run_legs(tiny_job, [Leg(f"split {policy}", split, memories=policy, **common) for policy in policies])
    back: dict[str, Any] = {"folder": folder, "streams": 2}
    grown = Leg("two keep", two, come_from="one average", memories="keep", **back)
    found |= run_legs(tiny_job, [grown, Leg("again", two, come_from="begin", **back)])
    saved = {name: whole_tensors(Path(leg["checkpoint"])) for name, leg in found.items()}
    first, second = memory_of(saved["begin"], 0), memory_of(saved["begin"], 1)
    assert differing(first, second) != []
    assert differing(saved["begin"], saved["again"]) == []
    with torch.random.fork_rng():
        fresh = Decoder(equivalence.model_config(one), equivalence.VOCABULARY, TorchBackend(), seed)
    pieces: dict[str, Any] = {}
    for index, state in fresh.fast_states():
        pieces |= memory_pieces(state, fast_name(0, index), Staging())
    save_tensors(Path(folder) / "fresh" / TENSORS, pieces)
    wanted = {
        "keep": first,
        "first": first,
        "average": mean_of(first, second),
        "reset": memory_of(whole_tensors(Path(folder) / "fresh"), 0),
    }
    for policy in policies:
        alone, divided = found[f"one {policy}"], found[f"split {policy}"]
        for leg, name in ((alone, f"one {policy}"), (divided, f"split {policy}")):
            assert leg["memories"] == 1
            assert leg["notes"] == [f"2 memories a layer in the checkpoint became 1 (checkpoint.memories={policy})"]
            assert differing(memory_of(saved[name], 0), wanted[policy]) == []
            weights = {n: t for n, t in saved[name].items() if not n.startswith("fast_state/")}
            assert differing(weights, {n: saved["begin"][n] for n in weights}) == []
        assert divided["losses"] == pytest.approx(alone["losses"], rel=TOLERANCE)
    assert found["one average"]["losses"] != found["one first"]["losses"] != found["one reset"]["losses"]
    assert found["two keep"]["memories"] == 2
    assert differing(memory_of(saved["two keep"], 0), wanted["average"]) == []
    assert differing(memory_of(saved["two keep"], 1), wanted["average"]) == []
