"""A fused step, compiled for an H100 that is not there, launches what the committed lists name and nothing else.

A new copy, clone, cast pass, `index_put_` or extra reduction fails here and is named, and so does a launch that is gone. After a
change that is meant to: `python -m tests.bench.test_compiled_launches` writes the lists, with a build of PyTorch that has CUDA.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from bench.compiled import KNOWN

ROOT = Path(__file__).parents[2]
FILE = Path(__file__).with_name("compiled_launches.json")
PRESETS = ("reference", "124m", "llama3.2-1b")
LAYERS = 2
"""A first one and a last one."""

can_compile = torch.version.cuda is not None and torch.__version__.startswith(tuple(KNOWN))


def launches(preset: str, folder: Path, *options: str) -> dict[str, dict[str, int]]:
    """How often each launch comes, by part, of the fused step."""
    file = folder / f"{preset}.json"
    command = [sys.executable, "-m", "bench.compiled", "--preset", preset, "--layers", str(LAYERS), "--no-code"]
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environ |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--json", str(file), *options], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Counter[str]] = {}
    for row in json.loads(file.read_text())["launches"]:
        word = {"copy": "COPY ", "fallback": "FALLBACK "}.get(row["kind"], "")
        found.setdefault(row["part"], Counter())[word + row["title"]] += 1
    return {part: dict(of_part) for part, of_part in found.items()}


@pytest.mark.skipif(not can_compile, reason=f"needs PyTorch {' or '.join(KNOWN)} with CUDA, and no GPU")
@pytest.mark.parametrize("preset", PRESETS)
def test_a_fused_step_launches_what_the_list_names(preset, tmp_path):
    found, listed = launches(preset, tmp_path), json.loads(FILE.read_text())[preset]
    for part in listed | found:
        have, want = Counter(found.get(part, {})), Counter(listed.get(part, {}))
        assert not have - want, f"{preset}, {part}: launches that are new: {dict(have - want)}"
        assert not want - have, f"{preset}, {part}: launches that are gone; write the list anew: {dict(want - have)}"


# The loss head's look at the address of its upstream gradient is an op, and an op may not return what it was given.
KNOWN_COPIES = {"COPY clone": 1}


def test_the_lists_hold_no_copy_but_those_known():
    for preset, parts in json.loads(FILE.read_text()).items():
        copies = Counter()
        for name, times in ((name, times) for of_part in parts.values() for name, times in of_part.items()):
            if name.startswith("COPY"):
                copies[" ".join(name.split()[:2])] += times
        assert copies <= Counter(KNOWN_COPIES), preset


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        lists = {preset: launches(preset, Path(folder)) for preset in PRESETS}
    FILE.write_text(json.dumps(lists, indent=1) + "\n")
