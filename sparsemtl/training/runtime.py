"""Device, precision, threads and seeds of a run."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import numpy as np
import torch

from sparsemtl.training import distributed

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class RuntimeConfig:
    """Where and how a run computes."""

    device: str = "auto"  # auto: cuda where there is one; cpu, cuda, cuda:1, …
    precision: str = "fp32"  # bf16: autocast forward; master weights and losses stay fp32
    threads: int | None = None  # CPU threads; None: torch's own number, recorded for resuming
    workers: int = 0  # loader processes
    sparse_kernels: bool = False  # layers run on the kernels that were measured fastest
    compile: bool = False  # torch.compile of what no sparse kernel computes
    cuda_graph: bool = False  # on a GPU: replay forward and backward once the masks are fixed

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"RuntimeConfig: Expected precision in {list(PRECISIONS)}, got {self.precision!r}"
            )
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"RuntimeConfig: Expected threads >= 1, got {self.threads}")
        if self.workers < 0:
            raise ValueError(f"RuntimeConfig: Expected workers >= 0, got {self.workers}")


def start(config: RuntimeConfig, seed: int) -> torch.device:
    """Set threads and seeds; returns the device.   raises: ValueError for an unusable device."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(seed)
    distributed.join()
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and distributed.size() > 1:
        name = f"cuda:{distributed.local_rank()}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"Expected a usable device, got device={name!r}: {reason}") from error
    if device.type == "cuda":  # the same seed gives the same bits
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
    return device


def part_streams(seed: int) -> None:
    """Give each process a random stream of its own; the first keeps the one it has.

    Called when the model is built, so that initial weights are equal and dropout is not.
    """
    if distributed.rank() > 0:
        own = np.random.SeedSequence([seed, distributed.rank()]).generate_state(1, np.uint64)
        torch.manual_seed(int(own[0] >> np.uint64(1)))


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[None]:
    """bf16 autocast, or nothing for fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def rng_state() -> dict[str, torch.Tensor | list[torch.Tensor]]:
    """The generators that training draws from."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict[str, torch.Tensor | list[torch.Tensor]]) -> None:
    cpu, cuda = state["cpu"], state["cuda"]
    assert isinstance(cpu, torch.Tensor)
    torch.set_rng_state(cpu)
    if torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(list(cuda))
