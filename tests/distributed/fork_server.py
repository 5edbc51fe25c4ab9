"""Starts ranks that have the libraries already: `python -m tests.distributed.fork_server`.

Importing torch, Megatron-Core and DeepSpeed takes a processor longer than most checks do. This process imports them
once and then forks the ranks of one script after the other. A request is a line of JSON on standard input (script,
arguments, processes, environment, output: a file for what the ranks print), the answer a line with their exit codes:
when one rank fails, the others are ended. It has no threads and no process group of its own, so a rank starts as a
fresh process does.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import socket
import sys
import threading
import time
from typing import Any

ANSWER = "exit codes: "
"""What lines of answers begin with; libraries print others."""
GRACE_SECONDS = 5.0
"""How long ranks have to tell why they fail too."""


def import_libraries() -> None:
    """What scripts of the workers use, and no more: nothing here may start a thread."""
    import deepspeed.runtime.pipe.engine  # noqa: F401
    import megatron.core.tensor_parallel  # noqa: F401

    import megatron_fwpkm.model.pipeline
    import megatron_fwpkm.parallel.megatron_layers
    import megatron_fwpkm.train.job  # noqa: F401


def start(request: dict[str, Any]) -> list[int]:
    """Fork the ranks; in each of them this runs the script and does not return."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    size, children = int(request["processes"]), []
    sys.stdout.flush()
    for rank in range(size):
        child = os.fork()
        if child == 0:
            run_rank(request, {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}, port)
        children.append(child)
    return children


def run_rank(request: dict[str, Any], ranks: dict[str, int], port: int) -> None:
    """Run the script as the main program and exit."""
    output = os.open(request["output"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for stream, source in ((0, nothing), (1, output), (2, output)):
        os.dup2(source, stream)
    os.environ.update({**request["environment"], **{name: str(value) for name, value in ranks.items()}})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.argv = [request["script"], *request["arguments"]]
    runpy.run_path(request["script"], run_name="__main__")
    sys.exit(0)


def wait_for(children: list[int]) -> list[int]:
    """Exit codes, in order of the ranks; as `subprocess` has them for signals."""
    codes: dict[int, int] = {}
    deadline = None
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    codes[child] = os.waitstatus_to_exitcode(status)
        if deadline is None and any(codes.values()):
            deadline = time.monotonic() + GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            for child in children:
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[child] for child in children]


def main() -> None:
    """Serve until standard input ends."""
    import_libraries()
    gc.freeze()  # or each collection of each rank would walk over all of the libraries
    assert threading.active_count() == len(os.listdir("/proc/self/task")) == 1, "a library has started threads"

    for line in sys.stdin:
        print(ANSWER + json.dumps(wait_for(start(json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
