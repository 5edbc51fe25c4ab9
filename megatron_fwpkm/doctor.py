"""What works on this machine, what is missing, and how to mend it: the library behind `launch/doctor.py`.

It has to run where everything else fails, on a Python too old for the rest too: it imports the standard library only
(rich just for a nicer table), and every import or backend is tried in a process of its own (`doctor_probes.py`), where
a crash or a hang costs one line of the report and nothing else.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from megatron_fwpkm import __version__, doctor_machine
from megatron_fwpkm.doctor_machine import Check
from megatron_fwpkm.doctor_probes import ProbeResult, run_probe

SUPPORTED_PYTHON = ((3, 11), (3, 13))  # oldest and newest minor version, as in pyproject.toml
# Without isolation, because Transformer Engine compiles against the torch that is installed.
GPU_INSTALL = "make setup EXTRAS=dev,gpu, or: pip install --no-build-isolation 'megatron-fwpkm[gpu]'"
TRANSFORMER_ENGINE_HINT = (
    "transformer-engine is installed but does not load, and that alone makes `import megatron.core` fail. "
    f"Without an NVIDIA GPU: pip uninstall transformer-engine. With one: {GPU_INSTALL}"
)


@dataclass(frozen=True)
class Library:
    """One third-party library: its distribution name, the probe that imports it, and the extra it comes with."""

    distribution: str
    probe: str | None = None  # None: cheap and reliable, the version says enough
    extra: str | None = None  # None: a dependency of the main job
    hint: str = ""  # what to do where it is missing, if that is not just to install it

    @property
    def required(self) -> bool:
        """Whether the main job on a CPU needs it."""
        return self.extra is None


LIBRARIES = (
    Library("torch", "torch"),
    Library("torchvision"),
    Library("numpy"),
    Library("safetensors"),
    Library("deepspeed", "deepspeed"),
    Library("megatron-core", "megatron"),
    Library("mosaicml-streaming", "streaming"),
    Library("zstandard"),
    Library("pyarrow"),
    Library("datasets"),
    Library("transformers", "transformers"),
    Library("huggingface-hub"),
    Library("tokenizers"),
    Library("pydantic"),
    Library("omegaconf"),
    Library("PyYAML"),
    Library("typer"),
    Library("rich"),
    Library("tensorboard"),
    Library("matplotlib"),
    Library("pandas"),
    Library("scipy"),
    Library("triton", extra="gpu", hint="pip install -c constraints.txt triton (no GPU: for the interpreter tests)"),
    Library("transformer-engine", extra="gpu"),
    Library("flash-linear-attention", extra="gpu"),
    Library("pytest", extra="dev"),
)


@dataclass(frozen=True)
class Report:
    """All checks of one run of doctor."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether the main job can run on this machine's CPU: nothing that it needs is missing or broken."""
        return not any(check.required and check.status in ("missing", "broken") for check in self.checks)

    def as_json(self) -> str:
        """The report as JSON: `version` and `ok`, and per check area, name, status, detail, hint, required."""
        content = {"version": __version__, "ok": self.ok, "checks": [asdict(check) for check in self.checks]}
        return json.dumps(content, indent=2, ensure_ascii=False)


def collect() -> Report:
    """Run every check, the slow ones side by side; about 20 seconds on two cores.

    Returns a report in any case: a check that fails, crashes or hangs is a finding, not an exception.
    """
    names = [library.probe for library in LIBRARIES if library.probe and installed_version(library.distribution)]
    if "torch" in names:
        names.append("gloo")
        if installed_version("triton"):
            names.append("triton_interpreter")
    with ThreadPoolExecutor(max_workers=4) as pool:
        first = dict(pool.map(_named_probe, names))
        cuda = cuda_devices(first.get("torch"))
        gpu_names = ["nccl", "triton_cuda", "transformer_engine", "fla"] if cuda else []
        if installed_version("transformer-engine") and not cuda:
            gpu_names.append("transformer_engine")
        probes = {**first, **dict(pool.map(_named_probe, gpu_names))}

    checks = [check_python(sys.version_info[:3])]
    checks += [check_library(library, probes) for library in LIBRARIES]
    checks += check_backends(probes, cuda)
    checks += doctor_machine.check_machine(Path.cwd())
    return Report(tuple(checks))


def _named_probe(name: str) -> tuple[str, ProbeResult]:
    return name, run_probe(name)


def installed_version(distribution: str) -> str | None:
    """The installed version of a distribution, or None where it (or its metadata) is missing."""
    try:
        return metadata.version(distribution)
    except (metadata.PackageNotFoundError, KeyError):
        return None


def check_python(version: tuple[int, ...]) -> Check:
    """Whether this interpreter (major, minor, micro) is in the supported range."""
    text = ".".join(map(str, version))
    oldest, newest = SUPPORTED_PYTHON
    allowed = f"{oldest[0]}.{oldest[1]} to {newest[0]}.{newest[1]}"
    if oldest <= tuple(version[:2]) <= newest:
        return Check("python", "python", "ok", f"{text} ({platform.machine()})", required=True)
    hint = f"use Python {allowed}: make clean-all setup PYTHON=python{newest[0]}.{newest[1]}"
    return Check("python", "python", "broken", f"{text}, supported: {allowed}", hint, required=True)


def check_library(library: Library, probes: dict[str, ProbeResult]) -> Check:
    """Version, supported range and import of one library."""
    name, required = library.distribution, library.required
    version = installed_version(name)
    wanted = declared_range(name)
    if version is None:
        return Check("library", name, "missing", "not installed", _how_to_install(library, wanted), required)

    result = probes.get(library.probe) if library.probe else None
    if name == "transformer-engine":
        result = probes.get("transformer_engine")
    if result is not None and not result.ok:
        hint = f"reinstall it: pip install --force-reinstall --no-deps -c constraints.txt '{name}'"
        if name == "transformer-engine" or (name == "megatron-core" and installed_version("transformer-engine")):
            hint = TRANSFORMER_ENGINE_HINT
        return Check("library", name, "broken", f"{version}, import fails: {result.detail}", hint, required)
    if not in_range(version, wanted):
        hint = f"tested with {wanted}: pip install -c constraints.txt '{name}{wanted}'"
        return Check("library", name, "warning", f"{version}, outside {wanted}", hint, required)
    detail = f"{version}, {result.detail}" if result and result.detail else version
    return Check("library", name, "ok", detail, required=required)


def _how_to_install(library: Library, wanted: str) -> str:
    if library.hint:
        return library.hint
    if library.extra == "gpu":
        return f"only for NVIDIA GPUs: {GPU_INSTALL}"
    if library.extra:
        return f"make setup, or: pip install 'megatron-fwpkm[{library.extra}]'"
    return f"make setup, or: pip install -c constraints.txt '{library.distribution}{wanted}'"


def declared_range(distribution: str) -> str:
    """The version range that this project declares for a distribution, such as '>=0.19,<0.20'; '' where unknown."""
    try:
        requirements = metadata.requires("megatron-fwpkm") or []
    except metadata.PackageNotFoundError:
        return ""
    pattern = re.compile(re.sub(r"[-_.]+", "[-_.]+", re.escape(distribution).replace(r"\-", "-")) + r"(?![-\w.])", re.I)
    for requirement in requirements:
        match = pattern.match(requirement)
        if match:
            rest = requirement[match.end() :].split(";")[0]
            return re.sub(r"\[.*?\]|\s", "", rest)
    return ""


def in_range(version: str, wanted: str) -> bool:
    """Whether a version is inside a range; True where packaging is not there to tell."""
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return True
    return SpecifierSet(wanted).contains(version, prereleases=True)


def cuda_devices(torch_result: ProbeResult | None) -> list[str]:
    """Names of the CUDA devices that torch sees, from the answer of its probe."""
    return list(torch_result.data.get("devices", [])) if torch_result and torch_result.ok else []


def check_backends(probes: dict[str, ProbeResult], cuda: list[str]) -> list[Check]:
    """Which ways to compute and communicate work: gloo, CUDA, NCCL, Triton, Transformer Engine, fla."""
    return [
        _backend(
            "gloo",
            probes.get("gloo"),
            required=True,
            absent="needs torch",
            hint="CPU jobs need gloo. If the host name does not resolve: export GLOO_SOCKET_IFNAME=lo",
        ),
        _check_cuda(probes.get("torch"), cuda),
        _backend(
            "nccl",
            probes.get("nccl"),
            absent="needs a CUDA device",
            hint="try again with NCCL_DEBUG=INFO for the reason",
        ),
        _backend(
            "triton (interpreter)",
            probes.get("triton_interpreter"),
            absent="needs triton",
            hint="pip install -c constraints.txt triton; it runs the kernels' tests without a GPU",
        ),
        _backend(
            "triton (device)",
            probes.get("triton_cuda"),
            absent="needs a CUDA device",
            hint="Triton compiles a small launcher: install a C compiler and Python's headers",
        ),
        _backend(
            "transformer engine",
            probes.get("transformer_engine") if cuda else None,
            absent="needs a CUDA device",
            hint=f"{GPU_INSTALL}; until then layers come from Megatron-Core without fp8",
        ),
        _backend(
            "flash-linear-attention",
            probes.get("fla") if cuda else None,
            absent="needs a CUDA device",
            hint=f"{GPU_INSTALL}; until then gated delta nets use the PyTorch path",
        ),
    ]


def _backend(name: str, result: ProbeResult | None, *, absent: str, hint: str, required: bool = False) -> Check:
    if result is None:
        return Check("backend", name, "missing", absent, required=required)
    if result.ok:
        return Check("backend", name, "ok", result.detail, required=required)
    return Check("backend", name, "broken", result.detail, hint, required)


def _check_cuda(torch_result: ProbeResult | None, cuda: list[str]) -> Check:
    if cuda:
        return Check("backend", "cuda", "ok", f"{len(cuda)} x {cuda[0]}")
    if torch_result is None or not torch_result.ok:
        return Check("backend", "cuda", "missing", "needs torch")
    build = torch_result.data.get("cuda_build")
    if not build:
        hint = "with an NVIDIA GPU: make clean-all, then make setup from an index with CUDA builds of torch"
        return Check("backend", "cuda", "missing", "this torch is a CPU build", hint)
    hint = "with an NVIDIA GPU: check that nvidia-smi works and its driver is new enough for this torch"
    return Check("backend", "cuda", "missing", f"torch is built for CUDA {build} but sees no device", hint)


MARKS = {"ok": "ok", "warning": "warning", "missing": "-", "broken": "BROKEN"}


def _mark(check: Check) -> str:
    return "MISSING" if check.required and check.status == "missing" else MARKS[check.status]


def _summary(report: Report) -> str:
    if report.ok:
        return "The main job can run on this machine's CPU."
    names = [check.name for check in report.checks if check.required and check.status in ("missing", "broken")]
    return f"The main job can NOT run here yet; needed first: {', '.join(names)}."


def render_plain(report: Report) -> str:
    """The report as text in columns, for terminals without rich."""
    width = max(len(check.name) for check in report.checks)
    lines = []
    area = ""
    for check in report.checks:
        if check.area != area:
            area = check.area
            lines.append(f"\n{area}")
        lines.append(f"  {check.name:<{width}}  {_mark(check):<8} {check.detail}")
    hints = [f"  {check.name}: {check.hint}" for check in report.checks if check.hint]
    if hints:
        lines += ["\nwhat to do", *hints]
    return "\n".join([f"megatron-fwpkm {__version__}", *lines, "", _summary(report)])


def print_rich(report: Report) -> None:
    """Print the report as a coloured table.

    Raises:
        ImportError: rich is not installed.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "warning": "yellow", "missing": "dim", "broken": "red"}
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    table = Table(title=f"megatron-fwpkm {__version__}", title_justify="left")
    for title in ("area", "what", "state", "detail"):
        table.add_column(title, overflow="fold")
    area = ""
    for check in report.checks:
        if area and check.area != area:
            table.add_section()
        colour = "red" if check.required and check.status == "missing" else colours[check.status]
        shown_area = check.area if check.area != area else ""
        table.add_row(shown_area, check.name, Text(_mark(check), style=colour), Text(check.detail))
        area = check.area
    console.print(table)
    hints = [check for check in report.checks if check.hint]
    if hints:
        console.print(Text("What to do", style="bold"))
    for check in hints:
        console.print(Text.assemble("  ", (check.name, "bold"), f": {check.hint}"), soft_wrap=True)
    console.print(Text(_summary(report), style="green" if report.ok else "bold red"))


def main(argv: Sequence[str] | None = None, collect_report: Callable[[], Report] = collect) -> int:
    """The command line of doctor.

    Returns 0 when the main job can run on this machine's CPU, 1 otherwise.
    """
    parser = argparse.ArgumentParser(prog="doctor", description="Say what works on this machine and how to mend it.")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args(argv)
    report = collect_report()
    if arguments.json:
        print(report.as_json())
        return 0 if report.ok else 1
    try:
        print_rich(report)
    except ImportError:
        print(render_plain(report))
    return 0 if report.ok else 1
