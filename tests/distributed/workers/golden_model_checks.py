"""Whole-model reference cases through Megatron's layers in float32; prints what failed as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from megatron_fwpkm.convert.golden import replay_model_case
from megatron_fwpkm.parallel import topology
from megatron_fwpkm.parallel.backend import megatron_backend
from megatron_fwpkm.parallel.settings import ParallelConfig


def main() -> None:
    cases = Path(sys.argv[2])
    topology.initialize(ParallelConfig(timeout_seconds=60))
    results = [replay_model_case(path, torch.float32, megatron_backend) for path in sorted(cases.glob("*.json"))]
    failed = [f"{result.name} {array.name}" for result in results for array in result.arrays if not array.passed]
    topology.shut_down()
    print(json.dumps({"arrays": [len(result.arrays) for result in results], "failed": failed}), flush=True)


if __name__ == "__main__":
    main()
