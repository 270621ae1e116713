"""Measured latency of sub-networks, and a description of the machine it was measured on."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from torch import nn
from tqdm.auto import tqdm

from dynabert_fast import __version__
from dynabert_fast.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dynabert_fast.subnet import Subnet


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module has its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


class PackedModel(nn.Module):
    """A model whose calls its CPU engine answers: measures the engine as the model is measured.

    Args:
        model: The model to pack.
        dtype: Of the engine: `fp32`, `bf16` or `int8`.

    Raises:
        InputError: The type is unknown, or the weights cannot be packed.
    """

    def __init__(self, model: PreTrainedModel, dtype: str) -> None:
        super().__init__()
        self.config = model.config
        self.device = torch.device("cpu")
        self.dtype = dtype
        self.engine = model.pack(dtype, threads=torch.get_num_threads())

    def forward(self, **inputs: Any) -> Any:
        """The engine's output."""
        return self.engine(**inputs)


@dataclass(frozen=True)
class Latency:
    """Wall-clock time of one forward pass in milliseconds: median and 10th and 90th percentile."""

    median_ms: float
    p10_ms: float
    p90_ms: float


def measure_latency(
    model: PreTrainedModel | PackedModel,
    subnets: Sequence[Subnet],
    batch_size: int = 1,
    length: int = 128,
    warmup: int = 3,
    rounds: int = 20,
    seed: int = 0,
    *,
    progress: bool = False,
) -> dict[Subnet, Latency]:
    """Time the forward pass of every sub-network on the model's device and in its dtype.

    One round runs each sub-network once, in an order drawn anew for each round, so that a change of
    clock speed or a busy neighbour meets all of them alike. The input is a batch of random tokens
    without padding; every pass is synchronised with the device before the clock is read.

    Args:
        model: The model; its training or evaluation mode is the same afterwards.
        subnets: The sub-networks; one that occurs twice is measured once.
        batch_size: Sequences per batch, B.
        length: Tokens per sequence, S.
        warmup: Rounds that are run and not counted.
        rounds: Rounds that are counted.
        seed: Of the tokens and of the order in each round.
        progress: Show a progress bar.

    Returns:
        The latency of each sub-network, in milliseconds per batch.

    Raises:
        InputError: No sub-network, a number below its minimum, or more tokens than the model takes.
    """
    for name, value, least in (
        ("the number of sub-networks", len(subnets), 1),
        ("batch_size", batch_size, 1),
        ("length", length, 1),
        ("warmup", warmup, 0),
        ("rounds", rounds, 1),
    ):
        if value < least:
            raise InputError(f"{name} must be at least {least}, got {value}")
    if length > model.config.max_tokens:
        raise InputError(
            f"length must be at most {model.config.max_tokens}, the longest sequence of the model, "
            f"got {length}"
        )
    unique = list(dict.fromkeys(subnets))
    rng = np.random.default_rng(seed)
    input_ids = _random_tokens(model, rng, batch_size, length)  # [B, S]
    attention_mask = torch.ones_like(input_ids)
    times: dict[Subnet, list[float]] = {subnet: [] for subnet in unique}
    with inference(model):
        for done in tqdm(range(warmup + rounds), "latency", disable=not progress, unit="round"):
            for index in rng.permutation(len(unique)):
                subnet = unique[index]
                _synchronize(model.device)
                start = time.perf_counter()
                model(input_ids=input_ids, attention_mask=attention_mask, subnet=subnet)
                _synchronize(model.device)
                elapsed = time.perf_counter() - start
                if done >= warmup:
                    times[subnet].append(elapsed)
    return {subnet: _summary(elapsed) for subnet, elapsed in times.items()}


def environment(model: PreTrainedModel | PackedModel) -> dict[str, str]:
    """Describe what a measurement depends on: device, threads, dtype and versions.

    Returns:
        Readable text by the keys `device`, `cpu`, `threads`, `dtype`, `python`, `torch`,
        `transformers` and `dynabert_fast`.
    """
    cpu = _cpu_name()
    on_gpu = model.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(model.device) if on_gpu else cpu,
        "cpu": cpu,
        "threads": str(torch.get_num_threads()),
        "dtype": (
            f"{model.dtype} ({model.engine.isa} engine)"
            if isinstance(model, PackedModel)
            else str(model.dtype).removeprefix("torch.")
        ),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dynabert_fast": __version__,
    }


def _random_tokens(
    model: PreTrainedModel | PackedModel, rng: np.random.Generator, batch_size: int, length: int
) -> torch.Tensor:
    """Draw `[B, S]` token ids, any but the padding token, on the model's device."""
    config = model.config
    ids = rng.integers(0, config.vocab_size - 1, size=(batch_size, length))
    if config.pad_token_id is not None:
        ids += ids >= config.pad_token_id  # skips it: RoBERTa reads positions off the padding id
    return torch.from_numpy(ids).to(model.device)


def _synchronize(device: torch.device) -> None:
    """Wait until the device has finished; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summary(seconds: Sequence[float]) -> Latency:
    median, p10, p90 = np.percentile(np.asarray(seconds) * 1e3, (50, 10, 90))
    return Latency(float(median), float(p10), float(p90))


def _cpu_name() -> str:
    """The CPU's marketing name where Linux tells it, else what Python knows."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
