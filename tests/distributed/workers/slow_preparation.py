"""A preparation that takes longer than collectives of its two ranks may; prints what they found as JSON."""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed

from megatron_fwpkm.config import load_train_config
from megatron_fwpkm.errors import SharedUserError, UserError
from megatron_fwpkm.parallel.topology import Topology
from megatron_fwpkm.train import job_data

TIMEOUT_SECONDS = 10


def main() -> None:
    config = load_train_config(Path(sys.argv[1]))
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_SECONDS))
    rank = torch.distributed.get_rank()
    ranks = Topology(rank, 2, rank, 2, rank, 2)
    prepare = job_data.prepare_corpus

    def slow(*arguments: Any) -> Any:
        time.sleep(TIMEOUT_SECONDS + 4)
        return prepare(*arguments)

    def failing(*arguments: Any) -> Any:
        raise UserError("built-in mistake")

    job_data.prepare_corpus = failing  # type: ignore[assignment]
    try:
        job_data._prepare_in_turns(config, ranks, lambda line: None)
        message = "none"
    except SharedUserError as error:
        message = str(error)
    job_data.prepare_corpus = slow  # type: ignore[assignment]
    begin = time.monotonic()
    folder, manifest = job_data._prepare_in_turns(config, ranks, lambda line: None)
    found: list[Any] = [None, None]
    one = {"folder": folder.name, "fingerprint": manifest.fingerprint, "message": message}
    torch.distributed.all_gather_object(found, one | {"waited": time.monotonic() - begin > TIMEOUT_SECONDS})
    if rank == 0:
        print(json.dumps({"ranks": found}), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
