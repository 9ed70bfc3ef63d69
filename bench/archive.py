"""What the commands of the bench have written: bench/results/<date>-<device>/*.json, oldest first."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from training.errors import UserError
from training.hardware import find_gpu

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Result:
    """One JSON of one command."""

    path: Path
    data: dict

    @property
    def bench(self) -> str:
        """The command: step, ops, check, loss_parity, parity, roofline, machine_code, generation, all."""
        return self.data["bench"]

    @property
    def gpu(self) -> str | None:
        """The GPU by its name in `training.hardware`, or as it calls itself; None where the result is a CPU's."""
        name = self.data["environment"]["gpu"]
        known = name and find_gpu(name)
        return known.name if known else name

    @property
    def date(self) -> str:
        """When it was written, as 2026-01-31T12:00:00+00:00."""
        return self.data["environment"]["date"]


def read(folder: Path = RESULTS) -> list[Result]:
    """All results below a folder by their dates; none where it is empty or not there.

    Raises UserError, naming the file, for a JSON that no command of the bench wrote.
    """
    return read_files(folder.glob("*/*.json"))


def read_one(path: str | Path) -> Result:
    """The result in a file. UserError, naming it, where it is not there or no command of the bench wrote it."""
    return _read(Path(path))


def read_files(paths: Iterable[Path]) -> list[Result]:
    """The results in these files by their dates; errors as those of `read`."""
    return sorted((_read(path, "; delete it") for path in sorted(paths)), key=lambda result: result.date)


def _read(path: Path, advice: str = "") -> Result:
    try:
        result = Result(path, json.loads(path.read_text(encoding="utf-8")))
        _ = result.bench, result.gpu, result.date
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is not what a command of the bench writes ({reason}){advice}") from None
    return result
