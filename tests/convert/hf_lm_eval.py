"""Runs lm-evaluation-harness with its stock `hf` backend on an export, on the tasks beside this file.

    python hf_lm_eval.py EXPORT RESULTS

RESULTS is written: of each task its metrics, and of each request what came back.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from megatron_fwpkm.compatibility import mend_torchvision

TASKS = Path(__file__).parent / "lm_eval_task"


def main(export: Path, results: Path) -> None:
    mend_torchvision()
    import lm_eval
    from lm_eval.tasks import TaskManager

    os.chdir(TASKS)  # the tasks name their data by its file name
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(export), "trust_remote_code": True, "dtype": "float32"},
        tasks=["small_choices", "small_texts"],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        device="cpu",
        batch_size=3,
        bootstrap_iters=0,
    )
    samples = {
        task: [{"document": sample["doc"], "responses": sample["resps"]} for sample in of_task]
        for task, of_task in found["samples"].items()
    }
    results.write_text(json.dumps({"metrics": found["results"], "samples": samples}, default=str))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
