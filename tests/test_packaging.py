"""The package as installed: what it imports, what it declares, and whether its many files agree with one another."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import megatron_fwpkm
from megatron_fwpkm import doctor

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "deepspeed", "megatron", "streaming", "transformers", "transformer_engine", "fla", "triton")
LIBRARY_FOLDERS = ("megatron_fwpkm", "kernels/fwpkm_kernels", "launch", "data_prep")
# Import names that differ from the distribution's.
DISTRIBUTIONS = {
    "fla": "flash-linear-attention",
    "megatron": "megatron-core",
    "streaming": "mosaicml-streaming",
    "transformer_engine": "transformer-engine",
    "yaml": "pyyaml",
}


def project_table() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def declared() -> dict[str, Requirement]:
    """Requirements of pyproject.toml outside the extra `dev`, by canonical name."""
    project = project_table()
    lines = project["dependencies"] + project["optional-dependencies"]["gpu"]
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}


def pinned() -> dict[str, Version]:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[str(canonicalize_name(name))] = Version(version)
    return pins


def third_party_imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names - {"megatron_fwpkm", "fwpkm_kernels"}


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = f"import sys, megatron_fwpkm, megatron_fwpkm.doctor; print([m for m in {HEAVY} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_one_version_everywhere() -> None:
    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert citation and citation[1] == megatron_fwpkm.__version__
    try:
        installed = metadata.version("megatron-fwpkm")
    except metadata.PackageNotFoundError:
        pytest.skip("megatron-fwpkm is not installed, so there is no installed version to compare with")
    assert installed == megatron_fwpkm.__version__


def test_one_range_of_python_everywhere() -> None:
    (oldest_major, oldest), (newest_major, newest) = doctor.SUPPORTED_PYTHON
    wanted = SpecifierSet(project_table()["requires-python"])
    assert wanted == SpecifierSet(f">={oldest_major}.{oldest},<{newest_major}.{newest + 1}")
    setup = (ROOT / ".ci/setup").read_text()
    assert f"OLDEST={oldest_major}.{oldest} NEWEST={newest_major}.{newest}\n" in setup


@pytest.mark.parametrize("folder", LIBRARY_FOLDERS)
def test_every_import_is_declared_and_pinned(folder: str) -> None:
    missing = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        local = {sibling.stem for sibling in path.parent.glob("*.py")} if folder in ("launch", "data_prep") else set()
        for module in third_party_imports(path) - local:
            name = canonicalize_name(DISTRIBUTIONS.get(module, module))
            if name not in declared() or name not in pinned():
                missing[module] = str(path.relative_to(ROOT))
    assert not missing, "imported, but not declared in pyproject.toml and pinned in constraints.txt"


def test_pins_are_inside_the_declared_ranges() -> None:
    project = project_table()
    lines = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    pins = pinned()
    for requirement in map(Requirement, lines):
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_pins_fit_any_build_of_torch() -> None:
    pins = pinned()
    assert not [name for name in pins if name.startswith("nvidia")]
    assert not [name for name, version in pins.items() if version.local]


def test_doctor_knows_every_dependency() -> None:
    known = {canonicalize_name(library.distribution) for library in doctor.LIBRARIES}
    assert set(declared()) - known <= {"packaging"}


def test_every_folder_with_sources_is_a_package() -> None:
    folders = {
        path.parent for name in ("megatron_fwpkm", "kernels/fwpkm_kernels") for path in (ROOT / name).rglob("*.py")
    }
    assert not [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").is_file()]
    assert (ROOT / "megatron_fwpkm/py.typed").is_file()


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.+)$", makefile, re.M)
    assert targets
    shown = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = re.findall(r"^  ([a-z-]+) +\S", shown.stdout.split("Variables")[0], re.M)
    assert sorted(listed) == sorted(targets[1].split())


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_ignored_paths(tmp_path: Path) -> None:
    shutil.copy(ROOT / ".gitignore", tmp_path)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)

    def ignored(path: str) -> bool:
        return subprocess.run(["git", "check-ignore", "-q", path], cwd=tmp_path).returncode == 0

    assert all(
        map(ignored, ("data/corpus/0.mds", "runs/a/metrics.jsonl", ".venv/bin/python", "build/x", "a.egg-info/x"))
    )
    assert not any(map(ignored, ("megatron_fwpkm/data/streaming.py", "configs/data/pg19.yaml", "tests/data/test_a.py")))
