"""From YAML files and `key.sub=value` overrides to a checked configuration.

A file may have an `include` mapping from section name to another file, relative to itself; the included file's
content becomes that section. It may build on another file of its kind, named by `base`. The file's own keys are merged
over both (mappings key by key, lists as a whole). Overrides come last.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from megatron_fwpkm.config.schema import TrainConfig
from megatron_fwpkm.data.settings import DataConfig
from megatron_fwpkm.errors import UserError
from megatron_fwpkm.model.settings import DecoderConfig


def load_train_config(
    path: Path | None, overrides: Sequence[str] = (), replaced: Mapping[str, Any] | None = None
) -> TrainConfig:
    """Read, compose and check the configuration of a training job; without a file the defaults.

    What stands under the keys of `replaced` is put in place of what the file has there, before overrides. Raises
    UserError with one message that names the file or override, the key and what to do.
    """
    return _load(TrainConfig, path, overrides, replaced or {})


def load_data_config(path: Path, overrides: Sequence[str] = ()) -> DataConfig:
    """Read and check the configuration of a corpus on its own (a file of configs/data/). Raises UserError."""
    return _load(DataConfig, path, overrides)


def load_model_config(path: Path, overrides: Sequence[str] = ()) -> DecoderConfig:
    """Read and check the shape of a model on its own (a file of configs/model/). Raises UserError."""
    return _load(DecoderConfig, path, overrides)


def to_yaml(config: BaseModel) -> str:
    """The configuration as YAML text, every field included."""
    from omegaconf import OmegaConf

    return str(OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json"))))


def differing_keys(left: Mapping[str, Any], right: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two nested mappings, each as "key (left value, right value)"."""
    found: list[str] = []
    for key in sorted(set(left) | set(right)):
        a, b, name = left.get(key), right.get(key), f"{prefix}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differing_keys(a, b, f"{name}.")
        elif a != b:
            found.append(f"{name} ({a!r}, {b!r})")
    return found


ConfigType = typing.TypeVar("ConfigType")


def _load(
    kind: type[ConfigType], path: Path | None, overrides: Sequence[str], replaced: Mapping[str, Any] | None = None
) -> ConfigType:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    tree = OmegaConf.create({}) if path is None else _compose(path, seen=())
    path = path or Path("defaults")
    for key, content in (replaced or {}).items():
        tree[key] = OmegaConf.create(dict(content)) if isinstance(content, Mapping) else content
    _reject_unknown(kind, _as_mapping(tree, path), where=str(path))
    try:
        for override in overrides:
            tree = OmegaConf.merge(tree, _parse_override(kind, override))
        content = _as_mapping(tree, path)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        raise UserError(_describe(error, path)) from error


def _compose(path: Path, seen: tuple[Path, ...]) -> Any:
    from omegaconf import DictConfig, OmegaConf

    resolved = path.resolve()
    if resolved in seen:
        raise UserError(f"{path}: includes itself; remove the loop of `include` or `base` entries")
    try:
        tree = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise UserError(f"no configuration file {path}; give an existing one, for example {_example()}") from error
    except OSError as error:
        if error.errno is None:  # OmegaConf's own, for a number or another single value
            raise UserError(f"{path}: expected a mapping of keys to values at the top, found one value") from error
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # the YAML parser raises types of its own, with positions in the message
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, DictConfig):
        raise UserError(f"{path}: expected a mapping of keys to values at the top, found a list")
    includes = tree.pop("include") if "include" in tree else OmegaConf.create({})
    if not isinstance(includes, DictConfig):
        raise UserError(f"{path}: `include` must map section names to files, as in `model: ../model/nano.yaml`")
    base = OmegaConf.create({})
    if "base" in tree:
        target = tree.pop("base")
        if not isinstance(target, str):
            raise UserError(f"{path}: `base` must name one other file, as in `base: common.yaml`")
        base = _compose(path.parent / target, (*seen, resolved))
    for section, target in includes.items():
        base[section] = _compose(path.parent / str(target), (*seen, resolved))
    return OmegaConf.merge(base, tree)


def _example() -> str:
    return "configs/train/nano.yaml"


def _as_mapping(tree: Any, path: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        content = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error
    return typing.cast(dict[str, Any], content)


def _parse_override(kind: type[Any], override: str) -> Any:
    from omegaconf import OmegaConf

    key, separator, _ = override.partition("=")
    if not separator or not key.strip():
        raise UserError(f"override {override!r}: write it as key.sub=value, for example training.steps=100")
    try:
        tree = OmegaConf.from_dotlist([override])
        content = typing.cast(dict[str, Any], OmegaConf.to_container(tree))
    except Exception as error:  # the value is parsed as YAML, whose errors have many types
        raise UserError(f"override {override!r}: the value is not valid YAML") from error
    _reject_unknown(kind, content, where=f"override {override!r}")
    if OmegaConf.missing_keys(tree):  # merging would keep the file's value without a word
        raise UserError(f"override {override!r}: ??? stands for a missing value; give one")
    return tree


def _fields(kind: Any) -> dict[str, Any] | None:
    """Name -> type of a section class's fields; None for anything that is not a section."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {name: field.annotation for name, field in kind.model_fields.items()}
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}
    options = [option for option in typing.get_args(kind) if _fields(option)] if typing.get_args(kind) else []
    return _fields(options[0]) if options else None


def _reject_unknown(kind: Any, content: Any, where: str, prefix: str = "") -> None:
    fields = _fields(kind)
    if fields is None or not isinstance(content, Mapping):
        return
    for key, value in content.items():
        if key not in fields:
            raise UserError(f"{where}: unknown key `{prefix}{key}`; {_suggest(str(key), list(fields), prefix)}")
        _reject_unknown(fields[key], value, where, f"{prefix}{key}.")


def _suggest(key: str, valid: list[str], prefix: str) -> str:
    nearest = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    if nearest:
        return f"did you mean `{prefix}{nearest[0]}`?"
    return f"valid keys here are {', '.join(sorted(valid))}"


def _describe(error: ValidationError, path: Path) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        given = problem.get("input")
        shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool | None) and key else ""
        lines.append(f"{key or 'configuration'}: {message}{shown}")
    return f"{path} (with overrides): " + "; ".join(lines) + ". Correct the file or give key.sub=value."
