"""Four processes in two groups of two read a corpus; prints what they found as JSON on rank 0."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from megatron_fwpkm.config import load_train_config
from megatron_fwpkm.data.batch import TokenBatch
from megatron_fwpkm.data.corpus import prepare_corpus
from megatron_fwpkm.data.manifest import Manifest
from megatron_fwpkm.data.streaming import ReadingPlan, TokenLoader

BATCHES = 3
BATCH_SIZE = 2


def gather(value: Any) -> list[Any]:
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def rows(batch: TokenBatch) -> list[Any]:
    parts = (batch.tokens_BT, batch.labels_BT, batch.documents_BT, batch.positions_BT)
    return [None if part is None else part.tolist() for part in parts]


def main() -> None:
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = torch.distributed.get_rank()
    groups = [torch.distributed.new_group(pair) for pair in ([0, 1], [2, 3])]
    config = load_train_config(Path(sys.argv[1]))
    corpus, manifest = prepare_corpus(config.data, config.seed)
    scratch = Path(gather(tempfile.mkdtemp() if rank == 0 else None)[0])

    def loader(plan: ReadingPlan, folder: Path, corpus_manifest: Manifest, cache: str, **place: Any) -> TokenLoader:
        where = scratch / cache
        return TokenLoader(
            folder, corpus_manifest, "train", cache=where, plan=plan, batch_size=BATCH_SIZE, workers=0, **place
        )

    found: dict[str, Any] = {}
    for name in ("joined", "separate"):
        plan = replace(ReadingPlan.of(config.data, shuffle=True), documents=name)
        place = {"replica": rank // 2, "replicas": 2, "group": groups[rank // 2]}
        shared = loader(plan, corpus, manifest, f"{name}-{rank}", **place)
        read = gather([rows(next(shared)) for _ in range(BATCHES)])
        alone = loader(plan, corpus, manifest, f"{name}-alone-{rank}")
        expected = [rows(next(alone)) for _ in range(2 * BATCHES)]
        found[name] = {
            "peers_agree": read[0] == read[1] and read[2] == read[3] and read[0] != read[2],
            "as_one_process": all(read[2 * r][n] == expected[2 * n + r] for r in range(2) for n in range(BATCHES)),
            "cursors": gather(shared.state_dict()["sample"]),
        }
        if name == "separate":
            found["documents"] = len({number for batch in expected for row in batch[2] for number in row})
        unpacked = gather(bool(list((scratch / f"{name}-{rank}").rglob("*.mds"))))
        found["readers"] = [reader for reader, has in enumerate(unpacked) if has]

    damaged = scratch / "damaged"
    if rank == 0:
        shutil.copytree(corpus, damaged)
        for shard in damaged.rglob("*.zstd"):
            shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    torch.distributed.barrier()
    broken = loader(plan, damaged, manifest, f"broken-{rank}", **place)
    try:
        next(broken)
        message = "none"
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    found["errors"] = gather(message)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    if rank == 0:
        shutil.rmtree(scratch)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
