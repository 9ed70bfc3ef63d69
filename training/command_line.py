"""From a command line, a TOML file and the run that is resumed to the configuration of a run. Imports neither torch nor triton.

Defaults come from the preset, then from the run being resumed, then from a TOML file (`--config FILE`); the command line wins.
"""

import argparse
import difflib
import re
import tomllib
import typing
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Literal

import tomli_w
import tyro

from kernels import grammar
from model.config import option
from training import run_folder
from training.config import TrainConfig, defaults, preset_options
from training.errors import UserError


def parse(arguments: list[str]) -> TrainConfig:
    """The configuration that a command line asks for, checked.

    Raises UserError for an unknown option and a mistake in a value or in a file of defaults, and SystemExit as tyro does:
    status 0 after --help, 2 for a value of another type.
    """
    arguments = _joined(arguments)
    early = _read_ahead(arguments)
    if early.pop("optimizer", "") == "fused-adamw":
        raise UserError("--optimizer fused-adamw is now --kernels adamw, which --fused and --kernels all include")
    file = _read_toml(Path(early["config"]), "--config") if "config" in early else {}
    asked = file | early
    preset = asked.get("preset")
    base = defaults(preset or "reference", asked.get("device", "auto"))
    if asked.get("init_from") == "resume" and not {"-h", "--help"} & set(arguments):
        base = _resumed(base, asked.get("out_dir", base.out_dir), preset)
    base = replace(base, **file)
    config, unknown = tyro.cli(
        TrainConfig, args=arguments, default=base, description=TrainConfig.__doc__, return_unknown_args=True
    )
    if unknown:
        if not unknown[0].startswith("-"):
            raise UserError(f"unexpected {unknown[0]!r}; options are --name value, and switches --name or --no-name")
        raise UserError(_unknown_option(unknown[0].partition("=")[0], [option(name) for name in _spellings()]))
    config.check()
    return config


def _joined(arguments: list[str]) -> list[str]:
    """`--kernels -rope` as one word: a parser takes a word that begins with a dash for an option."""
    joined: list[str] = []
    for word in arguments:
        switch = re.match(r"-([a-z_]+)", word)
        if joined and joined[-1] == "--kernels" and switch and switch[1] in grammar.SWITCHES:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _read_ahead(arguments: list[str]) -> dict[str, str]:
    """The options that decide the defaults of the others, read before the parser proper, which says what is wrong with them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("preset", "config", "out_dir", "init_from", "device", "optimizer"):
        parser.add_argument(option(name), f"--{name}", dest=name, default=argparse.SUPPRESS)
    try:
        return vars(parser.parse_known_args(arguments)[0])
    except argparse.ArgumentError:
        return {}


def _resumed(base: TrainConfig, out_dir: str, preset: str | None) -> TrainConfig:
    """The configuration of the run in `out_dir`, under the preset's where the command line or the file names another."""
    try:
        path = run_folder.find(out_dir) / "config.toml"
    except UserError as error:
        raise UserError(f"--init-from resume: {error}") from None
    saved = replace(base, **_read_toml(path, "--init-from resume"))
    if preset not in (None, saved.preset):
        saved = replace(saved, **preset_options(preset))
    # What was said of that call, not of the run; and the folder may have been moved since.
    return replace(saved, config="", eval_only=False, profile=False, init_from="resume", out_dir=out_dir)


def to_toml(config: TrainConfig) -> str:
    """The merged configuration as a file that --config reads."""
    return tomli_w.dumps(asdict(config))


def from_toml(text: str, name: str) -> TrainConfig:
    """A configuration that `to_toml` wrote; name: of the file, for errors."""
    return TrainConfig(**_options(tomllib.loads(text), name))


def _read_toml(path: Path, source: str) -> dict:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{source}: {path} could not be read: {error.strerror}") from None
    except ValueError as error:  # not UTF-8, or not TOML
        raise UserError(f"{source}: {path} is not a TOML file: {error}") from None
    return _options(table, str(path))


def _options(table: dict, path: str) -> dict:
    """Checks keys and types of a table of options; keys may be spelled with dashes. The alias n_group is understood."""
    types, options = typing.get_type_hints(TrainConfig), {}
    for key, value in _as_spelled_now(table).items():
        spelling = key.replace("-", "_")
        if spelling not in _spellings():
            raise UserError(f"{path}: {_unknown_option(key, list(_spellings()))}")
        name = _spellings()[spelling]
        if name in options:
            raise UserError(f"{path}: {key} is there twice, in two spellings")
        wanted = types[name]
        if typing.get_origin(wanted) is Literal:
            if value not in typing.get_args(wanted):
                raise UserError(f"{path}: {key} is {value!r}; allowed: {', '.join(typing.get_args(wanted))}")
        else:
            if wanted is float and type(value) is int:
                value = float(value)
            if type(value) is not wanted:
                raise UserError(f"{path}: {key} is {value!r}, of type {type(value).__name__}; wanted {wanted.__name__}")
        options[name] = value
    return options


def _as_spelled_now(table: dict) -> dict:
    """AdamW's kernel as the switch it is. Files of earlier runs say `optimizer = "fused-adamw"`, whatever their other kernels."""
    if table.get("optimizer") != "fused-adamw":
        return table
    kernels = str(table.get("kernels", ""))
    if table.get("fused") is not True:
        kernels = f"{kernels},adamw" if kernels else "adamw"
    elif "none" in "".join(kernels.split()).split(","):  # else --fused has it on
        kernels += ",adamw"
    return table | {"optimizer": "adamw", "kernels": kernels}


def _spellings() -> dict[str, str]:
    """Fields by the names they may be given under: their own, and the reference's n_group."""
    return {f.name: f.name for f in fields(TrainConfig)} | {"n_group": "n_kv_heads"}


def _unknown_option(found: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(found, allowed, n=1)
    return f"unknown option {found!r}" + (f"; did you mean {close[0]!r}?" if close else "; --help lists all options")
