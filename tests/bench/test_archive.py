"""Results are read back as they were written, each from the folder of the device that made it."""

import re

import pytest

from bench import archive
from bench.archive import RESULTS
from tests.bench.test_report import write_step
from training.errors import UserError


@pytest.mark.parametrize("result", archive.read(RESULTS), ids=lambda result: "/".join(result.path.parts[-2:]))
def test_a_result_lies_in_the_folder_of_the_device_that_made_it(result):
    """What no GPU ran, a prediction for one too, is a CPU's."""
    device = re.sub(r"\W+", "-", (result.data["environment"]["gpu"] or "cpu").lower())
    assert re.sub(r"^\d{4}-\d\d-\d\d-", "", result.path.parent.name) == device


@pytest.mark.parametrize("text", ["{", "[]", '{"bench": "step"}', '{"bench": "step", "environment": {"gpu": null}}'])
def test_a_broken_result_is_named(tmp_path, text):
    path = write_step(tmp_path)
    path.write_text(text)
    with pytest.raises(UserError, match=r"step\.json is not what a command of the bench writes"):
        archive.read(tmp_path)


def test_results_come_by_their_dates_and_none_from_a_folder_that_is_not_there(tmp_path):
    write_step(tmp_path, "a", date="2026-03-02T00:00:00+00:00")
    write_step(tmp_path, "b", date="2026-03-01T00:00:00+00:00")
    assert [result.path.stem for result in archive.read(tmp_path)] == ["b", "a"]
    assert archive.read(tmp_path / "nowhere") == []
