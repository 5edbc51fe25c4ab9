"""Kills of training jobs at random moments, and damage to what they leave: `python -m tests.distributed.kill_sweep`.

Each trial starts a tiny job where the one before was killed, kills all of its ranks or one (at a random time, or at a
random place of a save), and sometimes damages the newest checkpoint as well. Nothing may be lost: the next start must
go on from the newest checkpoint that is whole, name what it found damaged, and every step must be bitwise that of a job
that was never interrupted; so must the checkpoint at the end, after which another run begins. Results are kept as they
come: started again, the sweep goes on. At the end it writes docs/kills.md.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

from megatron_fwpkm.checkpoint.files import MANIFEST_FILE, damage_seen_alone
from tests.checkpoints import differing, whole_tensors
from tests.distributed.conftest import FORKS, TINY, Forks
from tests.distributed.workers.killed_job import PLACES

ROOT = Path(__file__).parents[2]
STEPS = 12
LAYOUTS: dict[str, tuple[str, ...]] = {
    "DP2 ZeRO-1": (),
    "DP2 ZeRO-3": ("training.zero_stage=3",),
    "TP2": ("parallel.tensor=2", "model.key_value_heads=2"),
    "DP2, one memory": ("parallel.memory.replicas=synced", "training.zero_stage=2"),
}
COMMON = (
    f"training.steps={STEPS}",
    "checkpoint.every=1",
    "checkpoint.keep_last_k=3",
    "evaluation.every=0",
    "logging.samples=0",
    "parallel.timeout_seconds=30",
)
DAMAGES = ("a flipped byte", "a file cut short", "a missing file", "no manifest", "half a manifest")


class Lost(AssertionError):
    """A start went on from the wrong place, or computed something else."""


class Sweep:
    """The trials of one folder.

    Args:
        folder: where runs and results are kept
        data: corpus of the tiny job, made if it is not there
        forks: what starts ranks
    """

    def __init__(self, folder: Path, data: Path, forks: Forks) -> None:
        self._folder, self._forks = folder, forks
        folder.mkdir(parents=True, exist_ok=True)
        self._results = folder / "results.jsonl"
        self._config = folder / "tiny.yaml"
        self._config.write_text(TINY.replace("RUN", str(folder / "run")).replace("DATA", str(data)))

    @property
    def trials(self) -> list[dict[str, Any]]:
        """Results so far."""
        return [json.loads(line) for line in self._results.read_text().splitlines()] if self._results.exists() else []

    def run(self, kills: int) -> list[dict[str, Any]]:
        """Make trials until so many jobs have been killed. Raises Lost."""
        while sum(trial["killed"] for trial in self.trials) < kills:
            trial = self._trial(len(self.trials))
            with self._results.open("a") as file:
                file.write(json.dumps(trial) + "\n")
        return self.trials

    def _start(self, run: Path, layout: str, fault: dict[str, Any], *overrides: str) -> tuple[list[int], str]:
        """Exit codes of the ranks, and what they printed."""
        output = self._folder / "output.txt"
        output.unlink(missing_ok=True)
        arguments = [json.dumps(fault), *COMMON, *LAYOUTS[layout], f"run_directory={run}", *overrides]
        script = Path(__file__).parent / "workers" / "killed_job.py"
        codes = self._forks.run(script, [str(self._config), *arguments], 2, output)
        return codes, output.read_text(errors="replace")

    def _reference(self, layout: str) -> Path:
        """A run that was never interrupted."""
        run = self._folder / "references" / layout.replace(" ", "_")
        if not (run / "finished").exists():
            shutil.rmtree(run, ignore_errors=True)
            codes, output = self._start(run, layout, {})
            assert codes == [0, 0], output
            (run / "finished").touch()
        return run

    def _trial(self, number: int) -> dict[str, Any]:
        draw = random.Random(number)
        run, about = self._folder / "run", self._folder / "run.json"
        if not about.exists():
            shutil.rmtree(run, ignore_errors=True)
            kills = collections.Counter(trial["layout"] for trial in self.trials if trial["killed"])
            layout = min(LAYOUTS, key=lambda name: kills[name])  # the one with the fewest
            about.write_text(json.dumps({"layout": layout, "expected": 0, "damaged": [], "starts": 0}))
        before = json.loads(about.read_text())
        layout = before["layout"]
        fault: dict[str, Any] = {"who": draw.choice(["all", "all", 0, 1])}
        if draw.random() < 0.3:
            fault["seconds"] = draw.uniform(0.1, 4.0)
        else:
            fault |= {"place": draw.choice(list(PLACES)), "save": draw.choice([1, 2, 3])}
        asynchronous = draw.random() < 0.6
        codes, output = self._start(run, layout, fault, f"checkpoint.asynchronous={asynchronous}")
        killed = -9 in codes
        trial = {"number": number, "layout": layout, "fault": fault, "asynchronous": asynchronous, "killed": killed}
        if not killed and codes != [0, 0]:
            raise Lost(f"trial {trial} ended with {codes}: {output}")
        starts = self._check(run, trial, before, output)
        if codes == [0, 0]:
            wrong = differing(*(whole_tensors(_last(folder)) for folder in (self._reference(layout), run)))
            if wrong or _last(run).name != f"step_{STEPS:08d}":
                raise Lost(f"trial {trial} ended with another checkpoint: {wrong}")
            about.unlink()
            return {**trial, "finished": True}
        damaged = self._damage(run, draw) if draw.random() < 0.3 else None
        whole, broken = _sorted_by_state(run)
        after = {
            "layout": layout,
            "expected": _step(whole[-1]) if whole else 0,
            "damaged": [path.name for path in broken],
            "starts": starts,
        }
        about.write_text(json.dumps(after))
        return {**trial, "damage": damaged, "newest": after["expected"]}

    def _check(self, run: Path, trial: dict[str, Any], before: dict[str, Any], output: str) -> int:
        """Where this start went on, what it said, and that every step is the reference's; starts so far."""
        log = run / "logs" / "train.log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        starts = [number for number, line in enumerate(lines) if "resumed from" in line]
        if len(starts) > before["starts"]:
            if f"step_{before['expected']:08d}" not in lines[starts[-1]]:
                raise Lost(f"trial {trial} went on from another checkpoint than {before['expected']}: {output}")
            for name in before["damaged"]:
                if not any(f"checkpoint {name} is damaged" in line for line in lines[: starts[-1]]):
                    raise Lost(f"trial {trial} did not tell that {name} is damaged: {output}")
        whole, broken = _sorted_by_state(run)
        surprising = {path.name for path in broken} - set(before["damaged"])
        if surprising:
            raise Lost(f"trial {trial} left half of {surprising}: {output}")
        if before["expected"] > (_step(whole[-1]) if whole else 0):
            raise Lost(f"trial {trial} lost step {before['expected']}: {output}")
        wanted = {record["step"]: record for record in _records(self._reference(trial["layout"]))}
        reached = _records(run)
        for record in reached:
            for name in ("train/loss", "train/gradient_norm", "memory/block_1/memory_loss"):
                if record[name] != wanted[record["step"]][name]:
                    raise Lost(f"trial {trial}: step {record['step']} has another {name}: {output}")
        if [record["step"] for record in reached] != list(range(1, len(reached) + 1)):
            raise Lost(f"trial {trial}: steps {[record['step'] for record in reached]} were recorded")
        return len(starts)

    def _damage(self, run: Path, draw: random.Random) -> str | None:
        """Damage the newest checkpoint where an older one is whole."""
        whole, _ = _sorted_by_state(run)
        if len(whole) < 2:
            return None
        kind, newest = draw.choice(DAMAGES), whole[-1]
        files = sorted(path for path in newest.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)
        victim, manifest = draw.choice(files), newest / MANIFEST_FILE
        content = bytearray(victim.read_bytes())
        if kind == "a flipped byte":
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            victim.write_bytes(bytes(content))
        elif kind == "a file cut short":
            victim.write_bytes(bytes(content[: draw.randrange(len(content))]))
        elif kind == "a missing file":
            victim.unlink()
        elif kind == "no manifest":
            manifest.unlink()
        else:
            manifest.write_text(manifest.read_text()[: draw.randrange(1, 100)])
        return f"{kind}: {victim.relative_to(newest)}" if "manifest" not in kind else kind


def _checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step_*"))


def _sorted_by_state(run: Path) -> tuple[list[Path], list[Path]]:
    """Checkpoints that are whole, and those that are not, oldest first."""
    broken = [path for path in _checkpoints(run) if damage_seen_alone(path)]
    return [path for path in _checkpoints(run) if path not in broken], broken


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _last(run: Path) -> Path:
    return _checkpoints(run)[-1]


def _records(run: Path) -> list[dict[str, Any]]:
    """Of steps; the last line may be half written."""
    path = run / "metrics.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if "train/loss" in record:
            found.append(record)
    return found


DOCUMENT = """# Kills

Written by `python -m tests.distributed.kill_sweep --kills {wanted}`. Each trial starts a job of two processes (one
memory layer, a checkpoint after every step) where the one before was killed, and kills all of its ranks, or one, with
SIGKILL: at a random time, or at a random place of the first, second or third save. After some, the newest checkpoint is
damaged as well. The next start must go on from the newest checkpoint that is whole and name what is damaged, every step
must be bitwise that of a job that was never interrupted, and so must the checkpoint at the end.

{kills} jobs were killed ({asynchronous} of them writing beside training), {damaged} checkpoints damaged, {finished}
runs finished. None lost a step that had a whole checkpoint, left half a checkpoint or computed anything else.

| killed | times |
| --- | --- |
{rows}

| layout | kills |
| --- | --- |
{layouts}

| damage | times |
| --- | --- |
{damages}
"""


def document(trials: list[dict[str, Any]], wanted: int) -> str:
    """The page about a sweep."""
    killed = [trial for trial in trials if trial["killed"]]
    places = collections.Counter(trial["fault"].get("place", "at a random time") for trial in killed)
    damages = collections.Counter(str(trial["damage"]).split(":")[0] for trial in trials if trial.get("damage"))

    def rows(counted: collections.Counter[str]) -> str:
        return "\n".join(f"| {name} | {count} |" for name, count in sorted(counted.items()))

    return DOCUMENT.format(
        wanted=wanted,
        kills=len(killed),
        asynchronous=sum(trial["asynchronous"] for trial in killed),
        damaged=sum(damages.values()),
        finished=sum(bool(trial.get("finished")) for trial in trials),
        rows=rows(places),
        layouts=rows(collections.Counter(trial["layout"] for trial in killed)),
        damages=rows(damages),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "kills")
    options = parser.parse_args()
    sweep = Sweep(options.folder, options.folder / "data", FORKS)
    try:
        trials = sweep.run(options.kills)
    except Lost as error:
        print(f"lost: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        FORKS.end()
    (ROOT / "docs" / "kills.md").write_text(document(trials, options.kills))
    print(f"{sum(trial['killed'] for trial in trials)} kills, nothing lost; see docs/kills.md")


if __name__ == "__main__":
    main()
