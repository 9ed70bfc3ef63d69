"""Every option of a run and what it may be: one dataclass, from which the parser and its help come (training/command_line.py).

Imports neither torch nor triton, so that options are refused at once.
"""

import importlib.util
import math
import os
import re
from dataclasses import dataclass, fields
from typing import Annotated, Literal

import tyro

from kernels import grammar
from model.config import PRESETS as SHAPES
from model.config import LlamaConfig, option
from training.errors import UserError

# What a preset sets beside the shape of the model, which is in model/config.py.
RUNS: dict[str, dict] = {
    "smoke": {
        "batch_size": 32,
        "gradient_accumulation_steps": 1,
        "learning_rate": 3e-3,
        "max_iters": 400,
        "warmup_iters": 40,
        "eval_interval": 100,
        "eval_iters": 10,
        "log_interval": 10,
    },
    "124m": {"batch_size": 64, "gradient_accumulation_steps": 8, "learning_rate": 6e-4},
    "350m": {"batch_size": 16, "gradient_accumulation_steps": 16, "learning_rate": 3e-4},
    "llama3.2-1b": {"batch_size": 4, "gradient_accumulation_steps": 8, "learning_rate": 3e-4},
    "llama3.2-3b": {"batch_size": 2, "gradient_accumulation_steps": 16, "learning_rate": 3e-4},
    "llama3.1-8b": {"batch_size": 1, "gradient_accumulation_steps": 32, "learning_rate": 3e-4},
    "llama3.1-70b": {"batch_size": 1, "gradient_accumulation_steps": 64, "learning_rate": 1.5e-4},
    "llama3.1-405b": {"batch_size": 1, "gradient_accumulation_steps": 128, "learning_rate": 8e-5},
}


# The least that a number option may be.
AT_LEAST = {
    1: "batch_size gradient_accumulation_steps max_iters eval_interval eval_iters log_interval keep_checkpoints "
    "max_skipped_steps process_timeout",
    0: "explain_skips check_steps data_workers warmup_iters decay_iters sample_tokens learning_rate min_lr weight_decay grad_clip "
    "seed",
}


@dataclass(kw_only=True)
class TrainConfig(LlamaConfig):
    """Train a Llama. Options not given come from the preset, or from the run that --init-from resume continues."""

    n_kv_heads: Annotated[int, tyro.conf.arg(aliases=["--n-group"])] = 4
    """Key and value heads; n_heads must be a multiple of it. --n-group is the reference's name for it."""

    # Where things come from and go to
    preset: str = "reference"
    """Run to start from: reference, smoke, 124m, 350m, llama3.2-1b, llama3.2-3b, llama3.1-8b, llama3.1-70b or llama3.1-405b."""
    config: str = ""
    """TOML file of defaults, keys spelled as the options; the command line wins."""
    data: str = "stdlib"
    """stdlib (Python's own source), tinystories (downloaded once), or a path: text, .jsonl, .json, .parquet, or a folder of any."""
    data_files: str = ""
    """Files of a folder to read, as a pattern of their names or paths such as *.jsonl; empty: all."""
    data_dir: str = "data"
    """Folder for downloads, tokenizers and token shards."""
    tokenizer: str = ""
    """A sentencepiece .model, or a tokenizer.json (pip install triton-llama[huggingface]); empty: one is trained on the data."""
    document_token: str = ""
    """The token of --tokenizer that opens each document; empty: its beginning of sequence, else <|endoftext|>."""
    split_text: str = "auto"
    """auto, blank-lines, lines, whole, or any separator; auto: <|endoftext|> where text holds it, else a file's blank lines."""
    text_field: str = ""
    """Field of a JSON or parquet record that holds the text; empty: text, else story."""
    skip_bad_files: bool = False
    """Leave out files and records that can't be read, and name them, instead of stopping."""
    character_coverage: float = 0.0
    """Share of characters that a trained tokenizer has tokens for; bytes spell the rest. 0: 0.9999, or what fits half of them."""
    data_workers: int = 0
    """Processes that encode text, each of up to 0.5 GiB; 0: one a CPU, up to 16, and at most half of the memory."""
    val_fraction: float = 0.05
    """Share of the documents held out for validation, where the data has no validation split of its own."""
    out_dir: str = "out"
    """Folder of the run: checkpoints, metrics, the loss curve."""
    init_from: str = "scratch"
    """scratch, resume (the run in out_dir, to the bit), or weights: a Hugging Face folder, another run or checkpoint, a .bin."""
    which: str = "last"
    """Checkpoint of a run's folder that --init-from continues or takes: last, best or a name such as step-00000400."""

    # How long, how often
    max_iters: int = 100_000
    """Optimizer steps in the whole run; the learning rate's decay ends here."""
    eval_interval: int = 2000
    """Steps between evaluations."""
    eval_iters: int = 100
    """Batches of each split in an evaluation."""
    eval_only: bool = False
    """Evaluate once, print it and exit; nothing is written."""
    log_interval: int = 1
    """Steps between log lines."""
    always_save_checkpoint: bool = False
    """Save at every evaluation, not only when the validation loss is better."""
    keep_checkpoints: int = 3
    """Newest checkpoints to keep; last and best are kept in any case."""
    sample_tokens: int = 100
    """Tokens of sample text at each evaluation and after the run; 0: none."""
    sample_prompt: str = ""
    """Text that the sample continues; empty: from the start of a document."""

    # A step
    batch_size: int = 128
    """Sequences in a micro-step."""
    gradient_accumulation_steps: int = 4
    """Micro-steps in an optimizer step, over all processes."""
    learning_rate: float = 5e-4
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at max_iters."""
    warmup_iters: int = 1000
    """Steps of linear warm-up."""
    decay_lr: bool = True
    """Let the learning rate follow the schedule; without it, it is learning_rate throughout."""
    packed_documents: bool = False
    """Mask attention across document boundaries: a token sees its own document only."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """Decay: a half cosine, or WSD: constant, then linear over the last decay_iters steps."""
    decay_iters: int = 0
    """Steps of WSD's linear decay; 0: a fifth of max_iters."""
    weight_decay: float = 0.1
    """Decoupled decay of the matrices; norms have none."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.95
    """AdamW's decay of the second moment."""
    momentum: float = 0.95
    """Muon's momentum."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient; 0: no clipping."""
    max_skipped_steps: int = 20
    """Updates in a row that may be skipped for a loss or gradient that is not finite before the run stops."""
    seed: int = 1337
    """Seed of the initial weights, the order of the data and dropout."""

    # How it is computed
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute dtype; parameters are float32. auto: bfloat16 on a GPU that has it, float16 on one that has not, float32 on a CPU."""
    compile: bool = False
    """torch.compile the model; on by default where there is a GPU."""
    fused: bool = False
    """The whole fast path: every Triton kernel, and each step one CUDA graph. Where no kernel can run, plain PyTorch does."""
    kernels: str = ""
    """Triton kernels by op and layer, e.g. all,-rope@0-1 or swiglu,adamw; empty: plain PyTorch. Wins over --fused."""
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """What each of many processes keeps: the whole model, a share of it (FSDP), or a share that every machine has once more."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Compute again in the backward pass what needs much memory: nothing, SwiGLU and the product before it, or whole layers."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """The method. muon: for the layers' matrices, with AdamW for the rest. AdamW's kernel is the switch adamw of --kernels."""
    capture: bool = True
    """With Triton kernels on a single GPU: run each step as one CUDA graph."""
    deterministic: bool = True
    """Same inputs, same bits; --no-deterministic lifts it."""

    explain_skips: int = 1
    """Skipped steps to explain: which op of which layer first gave what is not finite, and whether its kernel is to blame."""
    check_steps: int = 0
    """Make every N-th step twice and compare to the bit: finds hardware that fails and kernels with races; 0: never."""
    process_timeout: int = 600
    """With many processes: seconds to wait for one that does not answer before the run ends. Preparing text has no limit."""

    # What is recorded
    tensorboard: bool = True
    """Write TensorBoard events to out_dir/tensorboard."""
    wandb_log: bool = False
    """Log to Weights & Biases (pip install wandb)."""
    wandb_project: str = "triton-llama"
    """Weights & Biases project."""
    wandb_run_name: str = ""
    """Weights & Biases run name; empty: theirs."""
    profile: bool = False
    """Write a torch profiler trace of steps 3 to 5 to out_dir/profile.json, and print what took longest."""

    @property
    def weights(self) -> str:
        """The weights that --init-from names; empty where the run starts from scratch or resumes."""
        return "" if self.init_from in ("scratch", "resume") else self.init_from

    @property
    def model_name(self) -> str:
        """The preset where the model has its shape; else layers and width, which options or --init-from's weights may give."""
        preset = LlamaConfig(**SHAPES[self.preset])
        names = ("dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim")
        alike = all(getattr(self, name) == getattr(preset, name) for name in names)
        return self.preset if alike else f"{self.n_layers} layers of width {self.dim}"

    @property
    def kernel_spec(self) -> str:
        """The kernel selection that --fused and --kernels make together."""
        return ",".join(part for part in ("all" if self.fused else "", self.kernels) if part) or "none"

    def switches(self) -> frozenset[str]:
        """Switches that are on in some place, or of the run. ValueError for a selection that is none."""
        return _on(self.kernel_spec, self.n_layers)

    def uses_triton(self) -> bool:
        """Whether any layer or the optimizer is given a Triton kernel. ValueError for a selection that is none."""
        return bool(self.switches())

    def insists_on_kernels(self) -> bool:
        """Whether --kernels names one to turn on: the run is then refused where none can run. What --fused adds is a wish."""
        return bool(_on(self.kernels or "none", self.n_layers))

    def shape(self) -> LlamaConfig:
        """The model's part."""
        return LlamaConfig(**{f.name: getattr(self, f.name) for f in fields(LlamaConfig)})

    def check(self) -> None:
        """Raise UserError, naming the option, what was found and what is allowed, unless the run can be attempted."""
        try:
            super().check()
        except ValueError as error:
            raise UserError(error) from None
        try:
            switches = self.switches()
        except ValueError as error:
            raise UserError(f"--kernels: {error}") from None
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{option(field.name)} is {value}; it must be a finite number")
            if isinstance(value, str) and not is_text(value):
                raise UserError(f"{option(field.name)} is {value!r}, which is not UTF-8 text; rename what it names")
            if value == "" and field.name in ("data", "data_dir", "out_dir"):
                raise UserError(f"{option(field.name)} is empty")
        for least, names in AT_LEAST.items():
            for name in names.split():
                if getattr(self, name) < least:
                    raise UserError(f"{option(name)} is {getattr(self, name)}; it must be at least {least}")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{option(name)} is {getattr(self, name)}; it must be at least 0 and less than 1")
        if not 0 < self.val_fraction < 1:
            raise UserError(f"--val-fraction is {self.val_fraction}; it must be between 0 and 1")
        if not 0 <= self.character_coverage <= 1:
            raise UserError(f"--character-coverage is {self.character_coverage}; it must be at least 0 and at most 1")
        if self.min_lr > self.learning_rate:
            raise UserError(f"--min-lr {self.min_lr} is greater than --learning-rate {self.learning_rate}")
        if self.decay_iters > self.max_iters:
            raise UserError(f"--decay-iters {self.decay_iters} is greater than --max-iters {self.max_iters}")
        if self.check_steps and not self.deterministic:
            raise UserError(
                "--check-steps compares to the bit, and --no-deterministic lifts that; leave one of them out"
            )
        if self.seed >= 2**63:
            raise UserError(f"--seed is {self.seed}; it must be less than 2**63")
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", self.device):
            raise UserError(f"--device is {self.device!r}; allowed: auto, cpu, cuda, cuda:N")
        if self.wandb_log and importlib.util.find_spec("wandb") is None:
            raise UserError("--wandb-log: wandb is not installed; pip install wandb, or leave the option off")
        if "attention" in switches and not grammar.attention_serves(self.head_dim):
            raise UserError(
                f"--dim {self.dim} over --n-heads {self.n_heads} makes heads of {self.head_dim}; the attention kernel takes "
                "multiples of 4 from 16 to 256. Choose others, or leave it out: end --kernels with -attention"
            )
        if self.parallel != "ddp" and "adamw" in _on(self.kernels or "none", self.n_layers):
            raise UserError(
                f"--kernels {self.kernels} asks for AdamW's kernel, and --parallel {self.parallel} updates shares of matrices, "
                "which torch's AdamW does; end --kernels with -adamw"
            )
        if self.parallel != "ddp" and self.optimizer != "adamw":
            raise UserError(
                f"--optimizer is {self.optimizer}, which needs matrices whole, and --parallel {self.parallel} shares them out; "
                "allowed: adamw, or --parallel ddp"
            )
        reason = why_no_kernels(self, gpu_visible())
        if reason and self.insists_on_kernels():
            raise kernels_refused(self, reason)


def is_text(value: str) -> bool:
    """Whether a value can be kept with the run and named to the system: bytes that are not UTF-8 come as half characters."""
    return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)


def _on(spec: str, n_layers: int) -> frozenset[str]:
    """Switches that a selection turns on anywhere."""
    return frozenset().union(*grammar.parse(spec, n_layers), grammar.of_run(spec, n_layers))


# Which kernels can run is asked twice: of the system while the options are read, and of torch once that is imported.

NO_TRITON = "Triton is not installed"


def why_no_kernels(config: TrainConfig, has_gpu: bool) -> str:
    """Why no Triton kernel can run here; empty where they can: on a GPU, or in Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        return NO_TRITON
    if (has_gpu and config.device != "cpu") or interpreting():
        return ""
    return "--device is cpu" if config.device == "cpu" else "no GPU was found"


def other_way(reason: str) -> str:
    """What runs the kernels where, for this reason, they can't."""
    if reason == NO_TRITON:
        return "install Triton, which exists for Linux"
    return "set TRITON_INTERPRET=1 to run the kernels in Triton's interpreter (slow, for checking)"


def kernels_refused(config: TrainConfig, reason: str) -> UserError:
    """What to say where --kernels asks for kernels and, for this reason, none can run: the two ways on."""
    return UserError(
        f"--kernels {config.kernels} asks for Triton kernels, and {reason}. Say --kernels none for plain PyTorch, "
        f"or {other_way(reason)}"
    )


def gpu_visible() -> bool:
    """Whether a driver of a GPU that Triton can compile for is there: asked of the system, as torch is not imported yet."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return any(os.path.exists(path) for path in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd"))


def interpreting() -> bool:
    """Whether Triton will run kernels in its interpreter: the values of TRITON_INTERPRET that it takes for yes."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def defaults(preset: str, device: str = "auto") -> TrainConfig:
    """The configuration of a preset as it is when nothing else is said. UserError as `preset_options`."""
    return TrainConfig(**preset_options(preset), compile=device != "cpu" and gpu_visible())


def preset_options(preset: str) -> dict:
    """What a preset says of shape and run, by option. UserError, listing the presets, for an unknown one."""
    if preset not in SHAPES:
        raise UserError(f"--preset is {preset!r}; allowed: {', '.join(SHAPES)}")
    return {"preset": preset} | SHAPES[preset] | RUNS.get(preset, {})
