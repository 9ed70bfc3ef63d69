"""What pyproject.toml declares is what the two lock files pin, and so what the tests run on: the oldest of it and the newest."""

import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.support.run_testing import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DECLARED = {r.name: r for r in map(Requirement, [*PROJECT["dependencies"], *EXTRAS["dev"]])}
OLD = DECLARED | {r.name: r for r in map(Requirement, EXTRAS["huggingface"])}  # the newest environment does without
NOT_OLD = {"mypy", "ruff"}  # what they find is asked of the newest alone


def pinned(lock: str) -> dict[str, Version]:
    """The versions in a lock file, by canonical name."""
    lines = [line for line in (ROOT / lock).read_text().splitlines() if not line.startswith("#")]
    exact = [Requirement(line) for line in lines]
    return {canonicalize_name(r.name): Version(next(iter(r.specifier)).version) for r in exact}


@pytest.mark.parametrize("name", sorted(set(OLD) - NOT_OLD))
def test_the_oldest_environment_has_the_lower_bound(name):
    (bound,) = (Version(s.version) for s in OLD[name].specifier if s.operator == ">=")
    found = pinned("requirements-oldest.lock")[canonicalize_name(name)]
    assert found.release[: len(bound.release)] == bound.release
    assert not any(found.release[len(bound.release) :]), f"{found} is pinned, {bound} is declared"


@pytest.mark.parametrize("name", sorted(DECLARED))
def test_the_newest_environment_is_within_the_bounds(name):
    assert DECLARED[name].specifier.contains(pinned("requirements.lock")[canonicalize_name(name)])
