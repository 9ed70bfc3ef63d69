"""The table of GPU peaks: right figures, and never one for a GPU that is not in it."""

import subprocess
import sys

import pytest

from training.hardware import GPUS, find_gpu, mfu, peak_flops, peak_memory_bytes

# Device names as torch.cuda.get_device_name() gives them; dense bfloat16 TFLOP/s and GB/s from the datasheets.
KNOWN = {
    "NVIDIA H100 80GB HBM3": ("H100 SXM", 989.4, 3350),
    "NVIDIA H100 PCIe": ("H100 PCIe", 756.0, 2000),
    "NVIDIA H100 NVL": ("H100 NVL", 835.5, 3900),
    "NVIDIA H200": ("H200 SXM", 989.4, 4800),
    "NVIDIA H200 NVL": ("H200 NVL", 835.5, 4800),
    "NVIDIA GH200 480GB": ("GH200 96 GB", 989.4, 4000),
    "NVIDIA B200": ("B200", 2250.0, 7700),
    "NVIDIA GB200": ("GB200", 2500.0, 8000),
    "NVIDIA A100-SXM4-40GB": ("A100 SXM 40 GB", 312.0, 1555),
    "A100-SXM4-40GB": ("A100 SXM 40 GB", 312.0, 1555),
    "NVIDIA A100-SXM4-80GB": ("A100 SXM 80 GB", 312.0, 2039),
    "NVIDIA A100-PCIE-40GB": ("A100 PCIe 40 GB", 312.0, 1555),
    "NVIDIA A100 80GB PCIe": ("A100 PCIe 80 GB", 312.0, 1935),
    "NVIDIA A10": ("A10", 125.0, 600),
    "NVIDIA A10G": ("A10G", 70.0, 600),
    "NVIDIA L4": ("L4", 121.0, 300),
    "NVIDIA L40": ("L40", 181.05, 864),
    "NVIDIA L40S": ("L40S", 362.05, 864),
    "NVIDIA GeForce RTX 3090": ("RTX 3090", 71.0, 936),
    "NVIDIA GeForce RTX 4090": ("RTX 4090", 165.2, 1008),
    "NVIDIA GeForce RTX 5090": ("RTX 5090", 209.5, 1792),
    "NVIDIA RTX 6000 Ada Generation": ("RTX 6000 Ada", 364.2, 960),
    "Tesla V100-SXM2-16GB": ("V100 SXM2 16 GB", None, 900),
    "Tesla T4": ("T4", None, 320),
    "AMD Instinct MI300X": ("MI300X", 1307.4, 5300),
}

UNKNOWN = [
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 4080 SUPER",
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    "NVIDIA A100-SXM-64GB",
    "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
    "NVIDIA H100",
    "NVIDIA H800",
    "NVIDIA B200 NVL",
    "NVIDIA L4000",
    "nvidia",
    "cpu",
    "",
]


@pytest.mark.parametrize("device_name", KNOWN)
def test_a_known_name_gets_its_own_row(device_name):
    name, bf16, bandwidth = KNOWN[device_name]
    gpu = find_gpu(device_name)
    assert (gpu.name, gpu.bf16, gpu.bandwidth) == (name, bf16, bandwidth)


@pytest.mark.parametrize("device_name", UNKNOWN)
def test_a_name_that_only_resembles_a_row_gets_none(device_name):
    assert find_gpu(device_name) is None
    assert mfu(6e9, 1e4, device_name, "bfloat16") is None


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_the_figures_of_a_row_are_dense_and_agree_with_each_other(gpu):
    assert gpu.source
    if gpu.tf32 is None:
        assert gpu.bf16 is None  # both came with Ampere
        return
    assert gpu.bf16 == gpu.fp16
    # Tensor cores do TF32 at half the rate of half precision; a ratio of 4 or 1 would mean that one figure is sparse.
    assert gpu.bf16 / gpu.tf32 == pytest.approx(2, rel=0.03)
    assert gpu.tf32 >= gpu.fp32


def test_no_two_rows_share_a_name():
    assert len({gpu.name for gpu in GPUS}) == len({gpu.pattern for gpu in GPUS}) == len(GPUS)


def test_peak_flops_picks_the_column_of_the_dtype():
    a100 = find_gpu("NVIDIA A100-SXM4-80GB")
    assert [peak_flops(a100, name) for name in ("bfloat16", "float16", "tf32", "float32")] == [
        312e12,
        312e12,
        156e12,
        19.5e12,
    ]
    assert peak_flops(find_gpu("Tesla T4"), "bfloat16") is None
    with pytest.raises(ValueError, match=r"'float64'.*bfloat16, float16, tf32, float32"):
        peak_flops(a100, "float64")


def test_mfu_of_the_mission_log_is_reproduced():
    # 1,780 ms for 131,072 tokens at 1.32% of an A100's 312 TFLOP/s: 55.9 MFLOPs a token.
    assert mfu(55.93e6, 131072 / 1.780, "NVIDIA A100-SXM4-40GB", "bfloat16") == pytest.approx(0.0132, rel=1e-3)
    assert mfu(6e9, 1e4, "Tesla V100-SXM2-16GB", "bfloat16") is None  # the chip has no bfloat16


def test_peak_memory_of_the_cpu_is_the_resident_set_in_bytes():
    before = peak_memory_bytes("cpu")
    held = bytearray(b"x") * (200 * 2**20 + before)  # larger than anything so far, so the peak must move
    grown = peak_memory_bytes("cpu") - before
    assert 150 * 2**20 < grown < 2 * len(held)
    assert 2**20 < before < 2**40


def test_the_table_is_read_without_importing_torch():
    code = "import sys; from training.hardware import *; peak_memory_bytes('cpu'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
