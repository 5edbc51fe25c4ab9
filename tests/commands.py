"""Commands of launch/ in the process of a test: a start of their own takes seconds, for the libraries alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import typer
from typer.testing import CliRunner

LAUNCH = Path(__file__).parents[1] / "launch"


def run_command(name: str, *arguments: str | Path, expected: int = 0) -> str:
    """Run launch/<name>.py; returns what it printed."""
    script = importlib.util.spec_from_file_location(f"{name}_command", LAUNCH / f"{name}.py")
    assert script is not None and script.loader is not None
    module = importlib.util.module_from_spec(script)
    script.loader.exec_module(module)
    app = getattr(module, "app", None)
    if app is None:
        app = typer.Typer()
        app.command()(module.main)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == expected and "Traceback" not in result.output, result.output
    return result.output
