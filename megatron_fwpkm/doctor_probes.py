"""Small programs that `doctor` runs in processes of their own, each to try one library or backend.

A probe is the source of a script. It succeeds by exiting with 0; its last line on stdout is a JSON object whose
`detail` is shown to people. A failing probe is reported by the last line that it wrote to stderr.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 120.0  # the first import after an install reads some GiB and compiles byte code
DETAIL_CHARACTERS = 200


@dataclass(frozen=True)
class ProbeResult:
    """How a probe ended: `detail` is its finding or its error in one line, `data` all that it printed as JSON."""

    ok: bool
    detail: str
    data: dict[str, Any] = field(default_factory=dict)


_TORCH = """
import json, torch
devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
build = torch.version.cuda
print(json.dumps({"detail": f"CUDA {build} build" if build else "CPU build", "cuda_build": build, "devices": devices}))
"""

# A torchvision whose own operators can't load beside a CPU build of torch still serves streaming, which never uses
# them, once their names exist. The library does the same before it imports streaming.
_STREAMING_SHIMMED = """
import json, torch
operators = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    operators.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import streaming
print(json.dumps({"detail": "with stand-ins for torchvision's operators"}))
"""

_PROCESS_GROUP = """
import datetime, json, os, torch
import torch.distributed as dist
backend, device = os.environ["PROBE_BACKEND"], os.environ["PROBE_DEVICE"]
store = dist.FileStore(os.path.join(os.environ["PROBE_FOLDER"], "store"), 1)
dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=datetime.timedelta(seconds=30))
ones = torch.ones(4, device=device)
dist.all_reduce(ones)
assert ones.sum().item() == 4.0, "all-reduce returned a wrong sum"
dist.destroy_process_group()
version = "" if backend == "gloo" else " " + ".".join(map(str, torch.cuda.nccl.version()))
print(json.dumps({"detail": f"{backend}{version}: process group and all-reduce work"}))
"""

_TRITON = """
import json, os, torch, triton
import triton.language as tl

@triton.jit
def double(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, 2 * tl.load(x_ptr + i, mask=i < n), mask=i < n)

x = torch.arange(8.0, device=os.environ["PROBE_DEVICE"])
y = torch.empty_like(x)
double[(1,)](x, y, 8, BLOCK=8)
assert torch.equal(y, 2 * x), "a kernel returned wrong values"
print(json.dumps({"detail": "triton " + triton.__version__ + ": a kernel runs"}))
"""

_FLA = """
import json
from fla.ops.gated_delta_rule import chunk_gated_delta_rule
print(json.dumps({"detail": "gated delta rule importable"}))
"""


def _imports(module: str) -> str:
    return f'import json\nimport {module}\nprint(json.dumps({{"detail": ""}}))\n'


# name: (source, environment)
PROBES: dict[str, tuple[str, dict[str, str]]] = {
    "torch": (_TORCH, {}),
    "deepspeed": (_imports("deepspeed"), {}),
    "megatron": (_imports("megatron.core"), {}),
    "streaming": (_imports("streaming"), {}),
    "streaming_shimmed": (_STREAMING_SHIMMED, {}),
    "transformers": (_imports("transformers"), {}),
    "gloo": (_PROCESS_GROUP, {"PROBE_BACKEND": "gloo", "PROBE_DEVICE": "cpu"}),
    "nccl": (_PROCESS_GROUP, {"PROBE_BACKEND": "nccl", "PROBE_DEVICE": "cuda:0"}),
    "triton_interpreter": (_TRITON, {"TRITON_INTERPRET": "1", "PROBE_DEVICE": "cpu"}),
    "triton_cuda": (_TRITON, {"TRITON_INTERPRET": "0", "PROBE_DEVICE": "cuda:0"}),
    "transformer_engine": (_imports("transformer_engine.pytorch"), {}),
    "fla": (_FLA, {}),
}


def run_probe(name: str, timeout: float = TIMEOUT_SECONDS) -> ProbeResult:
    """Run one probe of `PROBES` in a process of its own and wait for it, `timeout` seconds at most.

    Raises:
        KeyError: there is no probe of that name.
    """
    result = run_script(*PROBES[name], timeout=timeout)
    if name == "streaming" and "torchvision::" in result.detail:
        return run_script(*PROBES["streaming_shimmed"], timeout=timeout)
    return result


def run_script(source: str, environment: dict[str, str], timeout: float = TIMEOUT_SECONDS) -> ProbeResult:
    """Run a script in a fresh folder, which is also its temporary folder, and read its answer."""
    with tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        # A file and not `-c`: Triton reads the source of its kernels.
        script = Path(folder) / "doctor_probe.py"
        script.write_text(source)
        settings = {"TMPDIR": folder, "TRITON_CACHE_DIR": folder, "PROBE_FOLDER": folder, "TQDM_DISABLE": "1"}
        try:
            process = subprocess.run(
                [sys.executable, str(script)],
                env={**os.environ, **settings, **environment},
                cwd=folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            return ProbeResult(False, f"no answer within {timeout:.0f} seconds")
        except OSError as error:
            return ProbeResult(False, f"could not start a process: {error}")
    return _read_answer(process)


def _read_answer(process: subprocess.CompletedProcess[str]) -> ProbeResult:
    if process.returncode < 0:
        return ProbeResult(False, f"the process was killed by signal {-process.returncode}")
    if process.returncode != 0:
        return ProbeResult(False, _error_line(process.stderr) or f"exit status {process.returncode}")
    try:
        data = json.loads(process.stdout.strip().splitlines()[-1])
        return ProbeResult(True, str(data["detail"]), data)
    except (IndexError, KeyError, TypeError, ValueError):
        return ProbeResult(False, "the process ended without an answer")


def _error_line(stderr: str) -> str:
    """The line that names the exception: the last one that starts a message, not a continuation or a hint."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    named = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception", "Exit"))]
    line = (named or lines or [""])[-1]
    return line if len(line) <= DETAIL_CHARACTERS else line[: DETAIL_CHARACTERS - 1] + "…"
