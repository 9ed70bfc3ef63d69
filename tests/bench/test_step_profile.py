import io
from types import SimpleNamespace

from rich.console import Console

from bench.step import profile


def events(*rows):
    return [SimpleNamespace(key=name, count=n, self_device_time_total=us) for name, n, us in rows]


def test_kernels_are_gathered_by_their_time():
    found = profile.gather(events(("copy", 2, 500.0), ("forward", 8, 2500.0), ("on the CPU", 1, 0.0)))
    assert found == {
        "busy_ms": 3.0,
        "launches": 10,
        "kernels": [{"name": "forward", "launches": 8, "ms": 2.5}, {"name": "copy", "launches": 2, "ms": 0.5}],
    }


def test_the_table_has_the_longest_and_the_rest_in_one_line(monkeypatch):
    monkeypatch.setattr(profile, "SHOWN", 1)
    found = profile.gather(events(("forward", 8, 2500.0), ("copy", 2, 500.0), ("fill", 1, 1000.0)))
    console = Console(file=io.StringIO(), width=120)
    console.print(profile.table("fused", found))
    shown = console.file.getvalue()
    assert "fused: 4.00 ms of work for the GPU in 11 launches" in " ".join(shown.split())
    assert [line.split()[1:-1:2] for line in shown.splitlines() if line.startswith("\u2502")] == [
        ["2.500", "62.5%", "8", "forward"],
        ["1.500", "37.5%", "3", "2", "kernels"],
    ]
