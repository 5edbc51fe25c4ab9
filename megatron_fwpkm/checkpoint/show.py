"""What launch/checkpoint.py prints."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_fwpkm.checkpoint.catalogue import (
    Description,
    describe,
    describe_layout,
    describe_tensors,
    find_checkpoints,
    prune,
)
from megatron_fwpkm.checkpoint.files import damage_seen_alone
from megatron_fwpkm.terminal import ProgressBar, new_console, print_line
from megatron_fwpkm.train.run_directory import lock_run_directory


def show(place: Path, console: Console) -> None:
    """A run's checkpoints, or what is in the only or given one. Raises UserError if there is none."""
    found = [describe(path) for path in find_checkpoints(place)]
    console.print(_table_of(found))
    if found[-1].path == place:
        _show_content(found[-1], console)


def _table_of(found: list[Description]) -> Table:
    table = Table("checkpoint", "step", "tokens", "MiB", "written by", "files (sizes only)")
    for one in found:
        state = one.state
        step, tokens, layout = ("?", "?", "?")
        if state is not None:
            step, tokens, layout = f"{state.step:,}", f"{state.tokens:,}", describe_layout(state)
        table.add_row(
            one.path.name,
            step,
            tokens,
            f"{one.num_bytes / 2**20:,.1f}",
            layout,
            "; ".join(one.wrong[:2]) or "as listed",
        )
    return table


def _show_content(one: Description, console: Console) -> None:
    if one.wrong:
        return
    table = Table("tensors", "number", "numbers in them", "MiB")
    for group in describe_tensors(one.path):
        table.add_row(escape(group.name), f"{group.tensors:,}", f"{group.numbers:,}", f"{group.num_bytes / 2**20:,.1f}")
    console.print(table)
    if one.state is not None:
        for name, value in one.state.data_cursor.items():
            console.print(f"data {name}: {value}")
        for name, value in one.state.corpus.items():
            console.print(f"{name}: {value}")


def verify_all(place: Path) -> bool:
    """Read every file of a run's checkpoints, or of the given one; whether all are whole."""
    whole = True
    for path in find_checkpoints(place):
        mebibytes = describe(path).num_bytes >> 20
        with ProgressBar(new_console(), f"reading {path.name} (MiB)", mebibytes) as bar:
            read = 0

            def advance(num_bytes: int, bar: ProgressBar = bar) -> None:
                nonlocal read
                read += num_bytes
                bar.update(read >> 20)

            wrong = damage_seen_alone(path, advance=advance)
        print_line(f"{path}: {'damaged: ' + '; '.join(wrong) if wrong else 'whole'}")
        whole = whole and not wrong
    return whole


def prune_run(run: Path, keep_last_k: int, keep_every: int | None, *, dry_run: bool) -> None:
    """Delete, or name, superfluous checkpoints. Raises UserError where a job is running."""
    find_checkpoints(run)  # before the lock makes folders
    with lock_run_directory(run):
        for path in prune(run, keep_last_k, keep_every, dry_run=dry_run):
            print_line(f"{'would delete' if dry_run else 'deleted'} {path}")
