"""torch.distributed.run as a child of the own launcher: says in a file, not in a report of pages, which rank failed.

Run as a file of its own, `python -P agent.py <failures file> <torch.distributed.run's arguments>`; it needs torch
alone. Exits with 0, or with 1 after writing [{"rank": 1, "status": -9}, ...], first failure first, as a message.

A message is the text before the first zero byte of a file that was reserved beforehand: what has to be told about a
full disk must not need room on it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from pathlib import Path

RESERVED_BYTES = 8192
"""Size of a message's file; longer messages are cut."""
_MOST_FAILURES = 100
"""Failures that surely fit; the first ones are the causes."""


def reserve_message(file: Path) -> None:
    """Make a file with room for a message, and none in it yet. Raises OSError."""
    file.write_bytes(bytes(RESERVED_BYTES))


def write_message(file: Path, message: str) -> None:
    """Write a message into its reserved file. Raises OSError, also where none was reserved."""
    with file.open("r+b", buffering=0) as reserved:
        reserved.write(message.encode()[: RESERVED_BYTES - 1] + b"\0")


def read_message(file: Path) -> str:
    """The message of a file; empty if there is none."""
    if not file.exists():
        return ""
    return file.read_bytes().partition(b"\0")[0].decode(errors="ignore")


def main(failures_file: Path, arguments: list[str]) -> int:
    """Run the processes to their end; returns the exit status."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.disable(logging.CRITICAL)
    try:
        run(parse_args(arguments))
    except ChildFailedError as error:
        failures = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
        content = [{"rank": rank, "status": failure.exitcode} for rank, failure in failures]
        with contextlib.suppress(OSError):
            write_message(failures_file, json.dumps(content[:_MOST_FAILURES]))
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), sys.argv[2:]))
