"""Command lines as people type them: `--prompt "- a list"`, `--compile=False`, an option that there is none of.

Imports neither torch nor triton.
"""

import difflib
import typing
from dataclasses import fields
from typing import Literal, TypeVar

import tyro

from model.config import option
from training.errors import UserError

T = TypeVar("T")
Spellings = dict[str, str]
"""Fields of a dataclass of options by the names they may be given under."""


def read(options: type[T], arguments: list[str], *, positional: tuple[str, ...] = ()) -> T:
    """The options of a program; positional: fields that are given without their names.

    Raises UserError for an unknown option, one without a value and a value of another type, and SystemExit with status 0 after
    --help.
    """
    names = {field.name: field.name for field in fields(options) if field.name not in positional}  # type: ignore[arg-type]
    spelled = spelled_out(arguments, options, names)
    check_types(spelled, options, names)
    found, unknown = tyro.cli(
        options,
        args=spelled,
        description=options.__doc__,
        return_unknown_args=True,
    )
    refuse(unknown, names)
    return found


def refuse(unknown: list[str], names: Spellings) -> None:
    """UserError for words of a command line that no option takes."""
    if not unknown:
        return
    # tyro takes no option behind a "--", which it gives back or drops, by its version.
    if unknown[0] == "--" or unknown[0].partition("=")[0].replace("_", "-") in map(option, names):
        raise UserError("unexpected '--'; options are --name value, and switches --name or --no-name")
    if not unknown[0].startswith("-"):
        raise UserError(f"unexpected {unknown[0]!r}; options are --name value, and switches --name or --no-name")
    raise UserError(unknown_option(unknown[0].partition("=")[0], [option(name) for name in names]))


def unknown_option(found: str, allowed: list[str]) -> str:
    """What to say of an option that there is none of: the one that was probably meant."""
    close = difflib.get_close_matches(found, allowed, n=1)
    return f"unknown option {found!r}" + (f"; did you mean {close[0]!r}?" if close else "; --help lists all options")


def spelled_out(arguments: list[str], options: type, names: Spellings) -> list[str]:
    """A command line as the parser proper takes it, which reads a word that begins with a dash as an option.

    `--kernels -rope` becomes one word, and `--compile=False`, as llama2.c has it, becomes `--no-compile`. UserError for an
    option that has no value.
    """
    types = typing.get_type_hints(options)
    fields_by_word = {f"--{name}": field for name, field in names.items()}
    fields_by_word |= {option(name): field for name, field in names.items()}
    negated = {"--no" + word[1:] for word, field in fields_by_word.items() if types[field] is bool}
    spelled: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        name, has_value, value = word.partition("=")
        field = fields_by_word.get(name)
        if field is None:
            spelled.append(word)
        elif types[field] is bool:
            spelled.append(_switch(name, value) if has_value else word)
        elif has_value or not (rest and rest[0].startswith("-")):
            if not (has_value or rest):
                raise UserError(f"{name} needs a value")
            spelled.append(word if has_value else f"{name}={rest.pop(0)}")
        else:
            value = rest.pop(0)
            known = value.partition("=")[0] in {*fields_by_word, *negated, "--help", "-h"}
            if known or value.startswith("--"):
                other = (
                    "" if known else f", and {value} is no option; a value that begins with a dash is {name}={value}"
                )
                raise UserError(f"{name} needs a value{other}")
            spelled.append(f"{name}={value}")
    return spelled


def check_types(spelled: list[str], options: type, names: Spellings) -> None:
    """UserError for a value of another type in what `spelled_out` gave, which the parser proper says in a box of lines."""
    types = typing.get_type_hints(options)
    for word in spelled:
        name, has_value, value = word.partition("=")
        field = names.get(name.removeprefix("--").replace("-", "_")) if has_value and name.startswith("--") else None
        wanted = types[field] if field else None
        allowed = [str(value) for value in typing.get_args(wanted)]
        if typing.get_origin(wanted) is Literal and value not in allowed:
            raise UserError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
        if wanted in (int, float):
            try:
                wanted(value)
            except ValueError:
                raise UserError(f"{name} is {value!r}; wanted a {'whole ' * (wanted is int)}number") from None


def _switch(name: str, value: str) -> str:
    if value.lower() not in ("true", "false"):
        raise UserError(f"{name} is {value!r}; it is a switch: {name} or --no{name[1:]}")
    return name if value.lower() == "true" else f"--no{name[1:]}"
