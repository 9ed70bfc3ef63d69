"""What `torch.compile` makes of a training step for a GPU that is not there, launch by launch.

    python -m bench.compiled --preset reference                      the fused step as it runs on an H100
    python -m bench.compiled --preset 124m --kernels none            the plain twins under torch.compile
    python -m bench.compiled --diff none all                         two selections of kernels
    python -m bench.compiled --diff main                             a commit against this working tree; two: against each other

Every launch of one micro-step and of the update is printed in order; layers that repeat are printed once:

    times       how often the launch comes
    launch      our Triton kernels by the names of their functions; what Inductor generated, by the calls that it computes and what
                it writes; products of a library, with their shapes; COPY: Inductor moves or casts and computes nothing; FALLBACK:
                compiled code calls PyTorch's own kernel
    for         the op that the launch serves, as bench.roofline names them
    MB          of the tensors that are loaded from and stored to, each byte once, and whole where a kernel of ours touches only
                a part of what it is given (queries in a packed product). A cache may spare some
    registers   of a thread; spills: bytes a thread; load/store: bytes of the widest access to global memory. From the machine code,
                which Triton builds here. Where Inductor has several configurations and chooses on the GPU, the least and the most

No GPU is needed, and none is asked; a build of PyTorch with CUDA is. Nothing is measured: which launches there are is exact, what
they move is counted, how long they take is not here.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rich.console import Console

from bench import command
from bench.measure import environment, write_json
from kernels.grammar import parse
from kernels.launch import HAVE_TRITON, TARGETS
from training.config import TrainConfig, defaults
from training.errors import UserError


@dataclass(kw_only=True)
class CompiledOptions:
    """Compile a training step for a GPU that is not there, and print what it launches."""

    preset: str = "reference"
    """Shape and batch, as in train.py."""
    kernels: str = "all"
    """Selection of kernels, as in train.py; none: the plain twins under torch.compile."""
    gpu: str = "h100"
    """GPU to compile for: a100, h100 or b200."""
    layers: int = 0
    """Layers of the model; 0: the preset's. Compiling takes about a second and a half a layer."""
    batch_size: int = 0
    """Sequences in a micro-step; 0: the preset's."""
    packed: bool = False
    """With packed documents: attention that does not look across their bounds."""
    deterministic: bool = True
    """Under deterministic algorithms, as train.py has them by default."""
    code: bool = True
    """Build the machine code; without it registers and the bytes of Triton's kernels are left out, and it takes half the time."""
    diff: list[str] = field(default_factory=list)
    """One or two selections of kernels or commits: print only what differs; of one, against --kernels in this working tree."""
    json: str = ""
    """File to write the result to."""


def measure(options: CompiledOptions, console: Console) -> dict:
    """Print what the options ask for and return (and write, where asked) the result."""
    check(options)
    here = environment()  # before there seems to be a GPU
    if not options.diff:
        from bench.compiled import show

        result = compiled(options, console) | {"environment": here}
        show.show(result, console)
    else:
        from bench.compiled import diff

        names = (*options.diff, f"{options.kernels} here")[:2]
        sides = [_side(name, options, console) for name in options.diff]
        before, after = (*sides, compiled(options, console)) if len(sides) == 1 else sides
        diff.show(before, after, names, console)
        result = diff.result(before, after, names) | {"environment": here}
    if options.json:
        write_json(options.json, result)
    return result


def check(options: CompiledOptions) -> None:
    """UserError for what can't be asked for, or not here."""
    if not HAVE_TRITON:
        raise UserError("bench.compiled: Triton is not installed here (it has no build for this machine?)")
    from bench.compiled import without_gpu

    command.check_at_least(options, layers=0, batch_size=0)
    command.check_writable(options.json)
    if options.gpu not in without_gpu.MODELS:
        raise UserError(f"--gpu is {options.gpu!r}; allowed: {', '.join(without_gpu.MODELS)}")
    if len(options.diff) > 2:
        raise UserError(f"--diff names {len(options.diff)}; it takes one or two")
    config = step_config(options)
    replace(config, kernels="").check()  # which would ask for the GPU that the kernels need
    try:
        config.switches()
    except ValueError as error:
        raise UserError(f"--kernels: {error}") from None
    without_gpu.require()


def step_config(options: CompiledOptions) -> TrainConfig:
    """The step to compile."""
    config = defaults(options.preset, "cpu")
    changed: dict[str, Any] = {
        "kernels": options.kernels,
        "deterministic": options.deterministic,
        "n_layers": options.layers or config.n_layers,
        "batch_size": options.batch_size or config.batch_size,
    }
    return replace(config, **changed)


def compiled(options: CompiledOptions, console: Console) -> dict:
    """The result of one selection, in this working tree."""
    from bench.compiled import without_gpu
    from bench.compiled.record import prepare, record
    from bench.roofline.__main__ import floor_tally

    config = step_config(options)
    prepare(options.gpu)
    with console.status(f"compiling {options.kernels}"):
        calls, in_two_micro_steps = record(config, options.packed)
    name, arch = without_gpu.MODELS[options.gpu]
    codes: list = [None] * len(calls)
    if options.code:
        from bench.compiled.code import build_all

        with console.status("building machine code"):
            calls, codes = zip(*build_all(calls, TARGETS[arch]), strict=True)
    one = replace(config, gradient_accumulation_steps=1)
    micro_steps = config.gradient_accumulation_steps
    return {
        "bench": "compiled",
        "preset": options.preset,
        "built_for": name,
        "arch": arch,
        "kernels": options.kernels,
        "packed": options.packed,
        "deterministic": options.deterministic,
        "batch_size": config.batch_size,
        "sequence_length": config.max_seq_len,
        "layers": config.n_layers,
        "micro_steps": micro_steps,
        "step_launches": len(calls) + (micro_steps - 1) * (in_two_micro_steps - len(calls)),
        "launches": [_row(call, code) for call, code in zip(calls, codes, strict=True)],
        "floor": {op: asdict(tally) for op, tally in floor_tally(one).items()},
    }


FIGURES = ("registers", "stack", "shared", "warps", "widest_load", "widest_store")
"""Of a kernel's machine code: least and most, or the one."""


def _row(call: Any, code: Any) -> dict:
    tensors = {name: str(shape) for name, shape in call.tensors.items()}
    figures = None if code is None else {name: code.figures(name) for name in FIGURES}
    names = ("part", "kind", "name", "title", "op", "origins", "site", "read", "written")
    return {name: getattr(call, name) for name in names} | {"tensors": tensors, "code": figures}


def _side(name: str, options: CompiledOptions, console: Console) -> dict:
    """A side of --diff: a selection of kernels, else a commit."""
    try:
        parse(name, step_config(options).n_layers)
    except ValueError:
        from bench.compiled.diff import result_at

        return result_at(name, words(options), console)
    return compiled(replace(options, kernels=name), console)


def words(options: CompiledOptions) -> list[str]:
    """The options that say what is compiled, as a command line."""
    default = CompiledOptions()
    found = []
    for name in ("preset", "kernels", "gpu", "layers", "batch_size", "packed", "deterministic", "code"):
        value, option = getattr(options, name), name.replace("_", "-")
        if value == getattr(default, name):
            continue
        found += [f"--{'' if value else 'no-'}{option}"] if isinstance(value, bool) else [f"--{option}", str(value)]
    return found


def main() -> None:
    """Run the command, in a process without Triton's interpreter, whose kernels can't be compiled."""
    command.leave_interpreter()
    command.run(CompiledOptions, __doc__, measure)


if __name__ == "__main__":
    main()
