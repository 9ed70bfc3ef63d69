"""What the hardware can do at most, and what the process used of its memory.

The one table of GPU peaks and bandwidths in this project. Every figure is the vendor's published one, and dense: tensor
core figures in datasheets are often those with 2:4 sparsity, twice as high and out of reach of any training run.
bfloat16 and float16 count products of half-precision inputs accumulated in float32, as every matrix product here does;
on GeForce cards that is half the advertised float16 figure. float32 is the IEEE rate of the plain cores, TF32 that of
the tensor cores. A chip that lacks a format has None there.
"""

import re
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Peaks of one GPU model as sold; a card under another power limit or name is another model."""

    name: str
    pattern: str  # regular expression for the whole device name, less a leading "NVIDIA "
    bf16: float | None  # dense TFLOP/s, float32 accumulation
    fp16: float  # dense TFLOP/s, float32 accumulation
    tf32: float | None  # dense TFLOP/s
    fp32: float  # TFLOP/s
    bandwidth: float  # GB/s (10^9 bytes) between the chip and its memory
    memory: int  # GB
    source: str


# fmt: off
GPUS = (
    #   name               device name                   bf16    fp16    tf32   fp32   GB/s   GB  source
    Gpu("V100 SXM2 16 GB", r"Tesla V100-SXM2-16GB",      None,  125.0,   None,  15.7,   900,  16, "V100 datasheet"),
    Gpu("V100 SXM2 32 GB", r"Tesla V100-SXM2-32GB",      None,  125.0,   None,  15.7,   900,  32, "V100 datasheet"),
    Gpu("V100 PCIe 16 GB", r"Tesla V100-PCIE-16GB",      None,  112.0,   None,  14.0,   900,  16, "V100 datasheet"),
    Gpu("V100 PCIe 32 GB", r"Tesla V100-PCIE-32GB",      None,  112.0,   None,  14.0,   900,  32, "V100 datasheet"),
    Gpu("V100S PCIe",      r"Tesla V100S-PCIE-32GB",     None,  130.0,   None,  16.4,  1134,  32, "V100 datasheet"),
    Gpu("T4",              r"Tesla T4",                  None,   65.0,   None,   8.1,   320,  16, "T4 datasheet"),
    Gpu("A100 SXM 40 GB",  r"A100-SXM4?-40GB",          312.0,  312.0,  156.0,  19.5,  1555,  40, "A100 datasheet"),
    Gpu("A100 SXM 80 GB",  r"A100-SXM4?-80GB",          312.0,  312.0,  156.0,  19.5,  2039,  80, "A100 datasheet"),
    Gpu("A100 PCIe 40 GB", r"A100-PCIE-40GB",           312.0,  312.0,  156.0,  19.5,  1555,  40, "A100 datasheet"),
    Gpu("A100 PCIe 80 GB", r"A100 80GB PCIe",           312.0,  312.0,  156.0,  19.5,  1935,  80, "A100 datasheet"),
    Gpu("A30",             r"A30",                      165.0,  165.0,   82.0,  10.3,   933,  24, "A30 datasheet"),
    Gpu("A40",             r"A40",                      149.7,  149.7,   74.8,  37.4,   696,  48, "A40 datasheet"),
    Gpu("A10",             r"A10",                      125.0,  125.0,   62.5,  31.2,   600,  24, "A10 datasheet"),
    Gpu("A10G",            r"A10G",                      70.0,   70.0,   35.0,  35.0,   600,  24, "A10G, secondary"),
    Gpu("RTX A6000",       r"RTX A6000",                154.8,  154.8,   77.4,  38.7,   768,  48, "GA102 whitepaper"),
    Gpu("RTX 3090",        r"GeForce RTX 3090",          71.0,   71.0,   35.6,  35.6,   936,  24, "GA102 whitepaper"),
    Gpu("RTX 3090 Ti",     r"GeForce RTX 3090 Ti",       80.0,   80.0,   40.0,  40.0,  1008,  24, "AD102 whitepaper"),
    Gpu("L4",              r"L4",                       121.0,  121.0,   60.0,  30.3,   300,  24, "L4 datasheet"),
    Gpu("L40",             r"L40",                     181.05, 181.05,   90.5,  90.5,   864,  48, "L40 datasheet"),
    Gpu("L40S",            r"L40S",                    362.05, 362.05,  183.0,  91.6,   864,  48, "L40S datasheet"),
    Gpu("RTX 6000 Ada",    r"RTX 6000 Ada Generation",  364.2,  364.2,  182.1,  91.1,   960,  48, "AD102 whitepaper"),
    Gpu("RTX 4080",        r"GeForce RTX 4080",          97.5,   97.5,   48.7,  48.7, 716.8,  16, "AD102 whitepaper"),
    Gpu("RTX 4090",        r"GeForce RTX 4090",         165.2,  165.2,   82.6,  82.6,  1008,  24, "AD102 whitepaper"),
    Gpu("H100 SXM",        r"H100 80GB HBM3",           989.4,  989.4,  494.7,  66.9,  3350,  80, "H100 whitepaper"),
    Gpu("H100 PCIe",       r"H100 PCIe",                756.0,  756.0,  378.0,  51.2,  2000,  80, "H100 datasheet"),
    Gpu("H100 NVL",        r"H100 NVL",                 835.5,  835.5,  417.5,  60.0,  3900,  94, "H100 datasheet"),
    Gpu("H200 SXM",        r"H200",                     989.4,  989.4,  494.7,  66.9,  4800, 141, "H200 datasheet"),
    Gpu("H200 NVL",        r"H200 NVL",                 835.5,  835.5,  417.5,  60.0,  4800, 141, "H200 datasheet"),
    Gpu("GH200 96 GB",     r"GH200 480GB",              989.4,  989.4,  494.7,  66.9,  4000,  96, "GH200 datasheet"),
    Gpu("GH200 144 GB",    r"GH200 144G HBM3e",         989.4,  989.4,  494.7,  66.9,  4900, 144, "GH200 datasheet"),
    Gpu("B200",            r"B200",                    2250.0, 2250.0, 1100.0,  75.0,  7700, 180, "HGX B200 datasheet"),
    Gpu("GB200",           r"GB200",                   2500.0, 2500.0, 1250.0,  80.0,  8000, 186, "GB200 datasheet"),
    Gpu("RTX 5080",        r"GeForce RTX 5080",         112.6,  112.6,   56.3,  56.3,   960,  16, "GB202 whitepaper"),
    Gpu("RTX 5090",        r"GeForce RTX 5090",         209.5,  209.5,  104.8, 104.8,  1792,  32, "GB202 whitepaper"),
    Gpu("MI300X",          r"AMD Instinct MI300X",     1307.4, 1307.4,  653.7, 163.4,  5300, 192, "MI300X datasheet"),
    Gpu("MI325X",          r"AMD Instinct MI325X",     1307.4, 1307.4,  653.7, 163.4,  6000, 256, "MI325X datasheet"),
)
# fmt: on


LINKS = {
    "V100 SXM2 16 GB": 150.0,
    "V100 SXM2 32 GB": 150.0,
    "A100 SXM 40 GB": 300.0,
    "A100 SXM 80 GB": 300.0,
    "H100 SXM": 450.0,
    "H200 SXM": 450.0,
    "B200": 900.0,
    "GB200": 900.0,
}
"""GB/s that a GPU sends to the others of its machine, while it receives as much: half of NVLink's figure in the same datasheets."""


def find_gpu(device_name: str) -> Gpu | None:
    """The row for a name as `torch.cuda.get_device_name()` gives it.

    None for any name that no row matches from end to end: a laptop or regional variant, a MIG slice and a GPU newer
    than the table all have other peaks than their namesakes, and a wrong MFU is worse than none.
    """
    name = device_name.removeprefix("NVIDIA ")  # drivers before 470 leave the vendor out
    return next((gpu for gpu in GPUS if re.fullmatch(gpu.pattern, name)), None)


def peak_flops(gpu: Gpu, dtype_name: str) -> float | None:
    """Dense peak in FLOP/s for `dtype_name`: bfloat16, float16, float32, or tf32; None where the chip lacks the format.

    Raises ValueError for another dtype.
    """
    teraflops = {"bfloat16": gpu.bf16, "float16": gpu.fp16, "tf32": gpu.tf32, "float32": gpu.fp32}
    if dtype_name not in teraflops:
        raise ValueError(f"peak_flops: dtype_name is {dtype_name!r}; it must be one of {', '.join(teraflops)}")
    peak = teraflops[dtype_name]
    return None if peak is None else peak * 1e12


def mfu(flops_per_token: float, tokens_per_second: float, device_name: str, dtype_name: str) -> float | None:
    """Model FLOPs utilization of one GPU as a fraction: FLOP/s that the model needs over the datasheet's dense peak.

    flops_per_token is that of `model/flops.py`, forward and backward; tokens_per_second is one GPU's share. None where
    the table has no peak for the device. Source: PaLM (arXiv:2204.02311), appendix B.
    """
    gpu = find_gpu(device_name)
    peak = None if gpu is None else peak_flops(gpu, dtype_name)
    return None if peak is None else flops_per_token * tokens_per_second / peak


def peak_memory_bytes(device) -> int:
    """Most memory held so far: what torch allocated on a CUDA device, else the resident set of this process, in bytes.

    device is a `torch.device` or its name. 0 where the system does not say (Windows without CUDA).
    """
    if str(device).startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
