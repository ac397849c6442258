"""Cost models of known GPUs, from data sheets, for a model and a load.

Roofline estimates, not measurements: prefill is bound by FLOPs, decode by memory bandwidth.
`cost_from` reads a measured cost model from the report of a run.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mellmpi.config import BatchConfig
from mellmpi.costs import CostModel

FP16 = 2  # bytes
PREFILL_SHARE = 0.5  # of peak FLOPs, reached by tuned kernels in a large prefill (gpt-fast, vLLM)
DECODE_SHARE = 0.8  # of peak bandwidth in a decode step: likewise
LAUNCH_S = 2e-3  # per step: scheduling, sampling, and other work without overlap (vLLM v1, one GPU)
LINK_LATENCY_S = 1e-3  # of a transfer: command, header, answer; without waits for a step's end
START_S = 1.0  # of a wake, in addition to loading weights: allocation, CUDA graphs
BLOCK_SIZE = 16  # tokens per KV block, vLLM's default
LIMITS = BatchConfig(max_num_seqs=256, max_num_batched_tokens=2048)  # vLLM's defaults


@dataclass(frozen=True)
class Gpu:
    """A GPU, its link and its storage."""

    flops: float  # per second: dense, 16 bit with 32 bit accumulation
    memory_Bps: float
    link_Bps: float  # between two hosts, per direction
    load_Bps: float  # weights, from local storage


PROFILES = {
    "A100-40G": Gpu(
        312e12,  # NVIDIA A100 data sheet: BF16 tensor core, without sparsity
        1.555e12,  # likewise, of the 40 GB variants
        25e9,  # one HDR InfiniBand port, 200 Gb/s, per GPU, as in DGX A100
        5e9,  # NVMe, PCIe 4.0: 7 GB/s by data sheets, less the copy to the device
    ),
    "RTX-4090": Gpu(
        165.2e12,  # NVIDIA Ada white paper: BF16 tensor core, 32 bit accumulation, no sparsity
        1.008e12,  # likewise
        12.5e9,  # 100 Gb/s Ethernet: the card has no NVLink; its PCIe 4.0 x16 is faster
        5e9,  # as above
    ),
    "H100": Gpu(
        989.4e12,  # NVIDIA H100 data sheet, SXM: BF16 tensor core, without sparsity
        3.35e12,  # likewise
        50e9,  # one NDR InfiniBand port, 400 Gb/s, per GPU, as in DGX H100
        10e9,  # NVMe, PCIe 5.0: 14 GB/s by data sheets, less the copy to the device
    ),
}


@dataclass(frozen=True)
class ModelShape:
    """Properties of a model that determine sizes and times; from its config.json and model card."""

    layers: int
    kv_heads: int
    head_size: int
    parameters: float
    active: float | None = None  # parameters used per token (mixture of experts); None: all

    @property
    def token_bytes(self) -> int:
        """KV bytes of one position, 16 bit."""
        return 2 * self.layers * self.kv_heads * self.head_size * FP16  # keys and values


MODELS = {
    "llama-2-7b": ModelShape(32, 32, 128, 6.74e9),
    "llama-2-13b": ModelShape(40, 40, 128, 13.02e9),
    "llama-2-70b": ModelShape(80, 8, 128, 68.98e9),
    "llama-3-8b": ModelShape(32, 8, 128, 8.03e9),
    "llama-3-70b": ModelShape(80, 8, 128, 70.55e9),
    "mistral-7b": ModelShape(32, 8, 128, 7.24e9),
    "mixtral-8x7b": ModelShape(32, 8, 128, 46.7e9, 12.9e9),
    "qwen2.5-7b": ModelShape(28, 4, 128, 7.62e9),
    "qwen2.5-14b": ModelShape(48, 8, 128, 14.77e9),
    "qwen2.5-32b": ModelShape(64, 8, 128, 32.76e9),
    "opt-13b": ModelShape(40, 40, 128, 12.85e9),
}


def cost_of(gpu: Gpu, model: ModelShape, context_bytes: float) -> CostModel:
    """Cost model of one GPU with this model; a decode reads `context_bytes` of KV per step."""
    weights = model.parameters * FP16
    token_flops = 2 * (model.active or model.parameters)
    return CostModel(
        prefill_token_s=token_flops / (PREFILL_SHARE * gpu.flops),
        step_s=LAUNCH_S + weights / (DECODE_SHARE * gpu.memory_Bps),
        decode_token_s=context_bytes / (DECODE_SHARE * gpu.memory_Bps),
        link_Bps=gpu.link_Bps,
        link_latency_s=LINK_LATENCY_S,
        wake_s=START_S + weights / gpu.load_Bps,
    )


def cost_from(path: str | Path) -> CostModel:
    """Cost model fitted to the report of a run (`run-batch --report`), or ValueError."""
    try:
        report: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        return CostModel.fitted(report["costs"])
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a report: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} has no costs of a run; give what run-batch --report wrote ({error})"
        ) from error
