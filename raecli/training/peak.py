"""What devices can do at best, for the share that training makes of it (MFU)."""

import torch

# Dense matrix products in TFLOP/s, bf16 with tensor cores and fp32 without, from NVIDIA's data sheets and architecture
# white papers (the sheets' bf16 figures are with sparsity: halved here). By the beginning of
# torch.cuda.get_device_name(), the longest that fits; a card that is not here has no MFU, unless the recipe tells its
# peak_tflops.
PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "NVIDIA A100-": {"bf16": 312.0, "fp32": 19.5},
    "NVIDIA A100 80GB PCIe": {"bf16": 312.0, "fp32": 19.5},
    "NVIDIA H100 80GB HBM3": {"bf16": 989.4, "fp32": 66.9},
    "NVIDIA H100 PCIe": {"bf16": 756.0, "fp32": 51.2},
    "NVIDIA H200": {"bf16": 989.4, "fp32": 66.9},
    "NVIDIA H200 NVL": {"bf16": 835.5, "fp32": 60.0},
    "NVIDIA L40S": {"bf16": 362.05, "fp32": 91.6},
    "NVIDIA RTX A6000": {"bf16": 154.8, "fp32": 38.7},
    "NVIDIA GeForce RTX 3090": {"bf16": 71.0, "fp32": 35.6},
    "NVIDIA GeForce RTX 4090": {"bf16": 165.2, "fp32": 82.6},
}
SLICE = " MIG "  # a part of a card, whose share of the peak is not in its name


def peak_flops(device: torch.device, precision: str, told_tflops: float | None = None) -> float | None:
    """FLOP/s of one device at best: what the recipe tells, else the table's; None on a CPU or an unknown card."""
    if told_tflops is not None:
        return told_tflops * 1e12
    return known_peak(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None


def known_peak(name: str, precision: str) -> float | None:
    """FLOP/s of a card by its name; None if the table does not have it."""
    fitting = [known for known in PEAK_TFLOPS if name.startswith(known)]
    if not fitting or SLICE in name or (name.startswith("NVIDIA GeForce") and name not in PEAK_TFLOPS):
        return None
    return PEAK_TFLOPS[max(fitting, key=len)][precision] * 1e12
