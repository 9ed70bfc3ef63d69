"""The newest figure of each GPU, size and variant out of all results, and the ratios that the goals are about."""

from dataclasses import dataclass, field

from bench.archive import Result
from bench.ops.rows import OpRow
from bench.report.goals import LOSS_HEAD_SIZE
from bench.step.variants import BASELINES, baseline
from model.config import PRESETS
from model.flops import parameters
from training.config import defaults
from training.errors import UserError

CPU = "CPU"

OpKey = tuple[str, str, str, str]
"""GPU, op, size, pass."""


@dataclass
class Steps:
    """One step on one device: the figures of each variant, or `failed` and why."""

    where: str
    preset: str
    batch: str
    plain_settings: bool
    """Whether it is the preset's own batch and layers, in half precision, deterministic, of tokens as frequent as in text: what the
    goals are about."""
    variants: dict[str, dict] = field(default_factory=dict)


class Standings:
    """Results in order of their dates, so that a later figure takes the place of an earlier one."""

    def __init__(self, results: list[Result]):
        self._results = results
        self._steps: dict[tuple, Steps] = {}
        self._ops: dict[OpKey, dict] = {}
        self._heads: dict[str, dict[str, dict]] = {}
        take = {"step": self._take_steps, "ops": self._take_ops}
        for result in results:
            try:
                take.get(result.bench, lambda _: None)(result)
            except (KeyError, TypeError, AttributeError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise UserError(
                    f"{result.path} is not what bench.{result.bench} writes ({reason}); delete it"
                ) from None

    @property
    def gpus(self) -> list[str]:
        """Those that a step or an op was measured on."""
        measured = (r for r in self._results if r.bench in ("step", "ops") and r.gpu)
        return list(dict.fromkeys(result.gpu for result in measured))

    def newest(self, bench: str, *keys: str) -> list[Result]:
        """The newest result of a command for each device and each value of these keys."""
        found = {(r.gpu, *(r.data[key] for key in keys)): r for r in self._results if r.bench == bench}
        return list(found.values())

    # ------------------------------------------------------------------------------------------------------------ steps

    def steps(self, gpu: str, preset: str) -> dict[str, dict]:
        """Figures by variant, of the settings that the goals are about: ms, mfu, peak_memory (bytes), tokens, date, and of its own
        run vs_best, how many times faster it is than `best`, the faster of compiled and compiled-captured; vs_baseline is the same
        where both were measured. profile, where one was taken. Of fused also memory_of_unchunked, where that was measured.
        """
        found = [s for s in self._steps.values() if (s.where, s.preset) == (gpu, preset) and s.plain_settings]
        return _with_memory_ratio(found[-1].variants, preset) if found else {}

    def all_steps(self) -> list[Steps]:
        """Those of other batches and settings too, after those that the goals are about."""
        return sorted(self._steps.values(), key=lambda steps: not steps.plain_settings)

    def _take_steps(self, result: Result) -> None:
        data = result.data
        shape = (data["micro_steps"], data["batch_size"], data["sequence_length"])
        # Older results name neither their layers, which were all, nor their tokens, which were drawn uniformly.
        layers, tokens = data.get("n_layers"), data.get("tokens", {"source": "uniform"})["source"]
        cut = layers not in (None, data.get("layers_of_preset"))
        settings = (data["dtype"], data["deterministic"], layers if cut else None, tokens == "uniform")
        key = (result.gpu or CPU, data["preset"], shape, settings)
        batch = " x ".join(map(str, shape)) + f", {data['dtype']}"
        batch += "" if data["deterministic"] else ", not deterministic"
        batch += f", {layers} of {data['layers_of_preset']} layers" if cut else ""
        batch += ", uniform tokens" if tokens == "uniform" else ""
        plain = _own_batch(data) and data["deterministic"] and data["dtype"] != "float32"
        plain = plain and not cut and tokens != "uniform"
        steps = self._steps.setdefault(key, Steps(result.gpu or CPU, data["preset"], batch, plain))
        ms = {row["variant"]: row["ms"] for row in data["rows"] if "ms" in row}
        best = baseline(data["rows"])
        for row in data["rows"]:
            names = ("ms", "ms_min", "ms_max", "mfu", "peak_memory", "failed", "profile")
            figures = {name: row[name] for name in names if name in row}
            if best in BASELINES and "ms" in row:
                figures |= {"best": best, "vs_best": ms[best] / row["ms"]}
                if all(name in ms for name in BASELINES):
                    figures["vs_baseline"] = figures["vs_best"]
            steps.variants[row["variant"]] = figures | {"date": result.date, "tokens": tokens}

    # -------------------------------------------------------------------------------------------------------------- ops

    def op(self, gpu: str, op: str, size: str, direction: str) -> dict:
        """Figures of the kernel: us, of_copy, tflops where counted, vs_best and best (of the peers), date."""
        return self._ops.get((gpu, op, size, direction), {})

    def all_ops(self) -> dict[OpKey, dict]:
        """All of them; where a kernel failed, `failed` and why."""
        return self._ops

    def loss_heads(self, gpu: str) -> dict[str, dict]:
        """Of each implementation of the loss head at the size of its goal: us, peak_memory (bytes); the ratios of `triton`."""
        return self._heads.get(gpu, {})

    def _take_ops(self, result: Result) -> None:
        for row in map(OpRow.read, result.data["rows"]):
            key = (result.gpu or CPU, row.op, row.size, row.direction)
            self._ops[key] = _op_figures(row) | {"date": result.date, "absent": result.data["absent"]}
            if key[1:] == ("linear_cross_entropy", LOSS_HEAD_SIZE, "both"):
                written = row.result()["timings"]
                heads = {name: timing for name, timing in written.items() if name not in ("copy", "matmul")}
                if "triton" in heads:
                    heads["triton"] |= _op_figures(row) | _memory_ratio(heads)
                self._heads[result.gpu or CPU] = heads


def _own_batch(data: dict) -> bool:
    if data["preset"] not in PRESETS:
        return False
    config = defaults(data["preset"], "cpu")
    own = (config.gradient_accumulation_steps, config.batch_size, config.max_seq_len)
    return own == (data["micro_steps"], data["batch_size"], data["sequence_length"])


def _with_memory_ratio(variants: dict[str, dict], preset: str) -> dict[str, dict]:
    """With `memory_of_unchunked` of the fused step: what both need beyond parameters, gradients and moments, all float32."""
    state = 16 * parameters(defaults(preset, "cpu"))
    memory = [variants.get(name, {}).get("peak_memory") for name in ("fused", "unchunked")]
    if not all(memory):
        return variants
    ratio = (memory[0] - state) / (memory[1] - state)
    return variants | {"fused": variants["fused"] | {"memory_of_unchunked": ratio}}


def _op_figures(row: OpRow) -> dict:
    if "triton" not in row.timings:
        return {"failed": row.failed["triton"]} if "triton" in row.failed else {}
    triton = row.result()["timings"]["triton"]
    figures = {name: triton[name] for name in ("us", "of_copy", "tflops") if name in triton}
    if row.best_peer:
        figures |= dict(zip(("best", "vs_best"), row.best_peer, strict=True))
    if "sdpa-mask" in row.speedup:
        figures["vs_mask"] = row.speedup["sdpa-mask"]
    return figures


def _memory_ratio(heads: dict[str, dict]) -> dict:
    memory = [heads.get(name, {}).get("peak_memory") for name in ("triton", "eager")]
    return {"memory_of_eager": memory[0] / memory[1]} if all(memory) else {}
