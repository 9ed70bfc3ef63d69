"""From a command line, a TOML file and the run that is resumed to the configuration of a run. Imports neither torch nor triton.

Defaults come from the preset, then from the run being resumed, then from a TOML file (`--config FILE`); the command line wins.
"""

import argparse
import math
import os
import tomllib
import typing
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Literal

import tomli_w
import tyro

from model.config import option
from training import pretrained, run_folder, spelling
from training.config import TrainConfig, defaults, preset_options
from training.errors import UserError

PATHS = ("config", "data", "data_dir", "tokenizer", "out_dir", "init_from")
"""Options that name a file or a folder, or may."""


def parse(arguments: list[str]) -> TrainConfig:
    """The configuration that a command line asks for, checked.

    Raises UserError for an unknown option and a mistake in a value or in a file of defaults, and SystemExit with status 0
    after --help.
    """
    arguments = spelling.spelled_out(arguments, TrainConfig, _spellings())
    early = _read_ahead(arguments)
    if early.get("config") == "":
        raise UserError("--config is empty; name a TOML file, or leave it out")
    if early.get("init_from") == "":
        raise UserError("--init-from is empty; allowed: scratch, resume, or what holds weights")
    if early.pop("optimizer", "") == "fused-adamw":
        raise UserError("--optimizer fused-adamw is now --kernels adamw, which --fused and --kernels all include")
    spelling.check_types(arguments, TrainConfig, _spellings())
    file = _read_toml(Path(early["config"]), "--config") if "config" in early else {}
    asked = file | _with_home(file) | early
    preset = asked.get("preset")
    base = defaults(preset or "reference", asked.get("device", "auto"))
    weights = None
    if not {"-h", "--help"} & set(arguments):
        init_from, which = asked.get("init_from", base.init_from), asked.get("which", base.which)
        if init_from == "resume":
            base = _resumed(base, asked.get("out_dir", base.out_dir), preset, which)
        elif init_from != "scratch":
            weights = pretrained.of_option(init_from, which)
            base = replace(base, **weights.options())
    base = replace(base, **file)
    config, unknown = tyro.cli(
        TrainConfig, args=arguments, default=base, description=TrainConfig.__doc__, return_unknown_args=True
    )
    spelling.refuse(unknown, _spellings())
    config = replace(config, **_with_home(vars(config)))
    config.check()
    if not config.eval_only:
        run_folder.refuse_weights(config.out_dir)
    if weights:
        weights.check_agrees(config)
    return config


def _with_home(options: dict) -> dict:
    """Those of the options that name files, with ~ as the home directory: no shell has seen what stands in a TOML file."""
    return {name: os.path.expanduser(options[name]) for name in PATHS if name in options}


def _read_ahead(arguments: list[str]) -> dict[str, str]:
    """The options that decide the defaults of the others, read before the parser proper, which says what is wrong with them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("preset", "config", "out_dir", "init_from", "which", "device", "optimizer"):
        parser.add_argument(option(name), f"--{name}", dest=name, default=argparse.SUPPRESS)
    try:
        early = vars(parser.parse_known_args(arguments)[0])
    except argparse.ArgumentError:
        return {}
    return early | _with_home(early)


def _resumed(base: TrainConfig, out_dir: str, preset: str | None, which: str) -> TrainConfig:
    """The configuration of the run in `out_dir`, of its checkpoint `which`.

    Under the preset's, where the command line or the file names another.
    """
    try:
        folder = run_folder.find(out_dir, which)
    except UserError as error:
        raise UserError(f"--init-from resume: {error}") from None
    try:
        saved = replace(base, **_read_toml(folder / "config.toml", "--init-from resume"))
    except UserError as error:
        raise UserError(f"{error}{run_folder.others_than(folder)}") from None
    if preset not in (None, saved.preset):
        saved = replace(saved, **preset_options(preset))
    if saved.tokenizer and not Path(saved.tokenizer).is_file():  # the checkpoint has a copy
        saved = replace(saved, tokenizer=str(pretrained.tokenizer_in(folder) or saved.tokenizer))
    # What was said of that call, not of the run; and the folder may have been moved since.
    return replace(saved, config="", eval_only=False, profile=False, init_from="resume", which="last", out_dir=out_dir)


def to_toml(config: TrainConfig) -> str:
    """The merged configuration as a file that --config reads."""
    return tomli_w.dumps(asdict(config))


def from_toml(text: str, name: str) -> TrainConfig:
    """A configuration that `to_toml` wrote; name: of the file, for errors."""
    return TrainConfig(**_options(_table(text, name), name))


def _read_toml(path: Path, source: str) -> dict:
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
    except OSError as error:
        raise UserError(f"{source}: {path} could not be read: {error.strerror}") from None
    except ValueError as error:  # not UTF-8
        raise UserError(f"{source}: {path} is not a TOML file: {error}") from None
    return _options(_table(text, f"{source}: {path}"), str(path))


def _table(text: str, name: str) -> dict:
    """The keys and values of a TOML file; name: of the file, for errors."""
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not a TOML file: {error}") from None


def _options(table: dict, path: str) -> dict:
    """Checks keys and types of a table of options; keys may be spelled with dashes. The alias n_group is understood."""
    types, options = typing.get_type_hints(TrainConfig), {}
    for key, value in _as_spelled_now(table).items():
        spelled = key.replace("-", "_")
        if spelled not in _spellings():
            raise UserError(f"{path}: {spelling.unknown_option(key, list(_spellings()))}")
        name = _spellings()[spelled]
        if name in options:
            raise UserError(f"{path}: {key} is there twice, in two spellings")
        wanted = types[name]
        if typing.get_origin(wanted) is Literal:
            if value not in typing.get_args(wanted):
                raise UserError(f"{path}: {key} is {value!r}; allowed: {', '.join(typing.get_args(wanted))}")
        else:
            if wanted is float and type(value) is int:
                value = float(value) if abs(value) < 2**1000 else math.inf
            if type(value) is not wanted:
                raise UserError(f"{path}: {key} is {value!r}, of type {type(value).__name__}; wanted {wanted.__name__}")
        options[name] = value
    return options | _with_home(options)


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


def _spellings() -> spelling.Spellings:
    """Fields by the names they may be given under: their own, and the reference's n_group."""
    return {f.name: f.name for f in fields(TrainConfig)} | {"n_group": "n_kv_heads"}
