"""A network as files of other programs' formats: written, run again, compared and timed, all on the CPU in float32."""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kd_dist.errors import UserError
from kd_dist.trained import WEIGHTS, Model, load

ONNX, PT2 = "model.onnx", "model.pt2"
TOLERANCE = 1e-4  # largest difference of a logit
BATCHES = (1, 64)
SECONDS, FEWEST, MOST = 2.0, 5, 50  # calls are timed for so long, but at least and at most so many

Run = Callable[[Tensor], Tensor]
"""Input images [B, 3, S, S] -> logits float32 [B, K]."""


class FromPixels(nn.Module):
    """A network that normalises its input itself: images uint8 [B, 3, S, S] -> logits [B, K]."""

    mean_C11: Tensor
    std_C11: Tensor

    def __init__(self, model: Model):
        super().__init__()
        self.network = model.network
        mean_C, std_C = torch.tensor(model.mean), torch.tensor(model.std)
        self.register_buffer("mean_C11", mean_C[:, None, None])
        self.register_buffer("std_C11", std_C[:, None, None])

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.network((images_BCHW.to(torch.float32) / 255 - self.mean_C11) / self.std_C11)


def write_graphs(model: Model, folder: Path, with_preprocessing: bool) -> None:
    """Write model.pt2 and model.onnx, for any batch size. Raises UserError where the network cannot be traced, or ONNX
    lacks one of its operators.
    """
    graph = copy.deepcopy(FromPixels(model) if with_preprocessing else model.network)
    graph = graph.cpu().to(memory_format=torch.contiguous_format).eval()
    example_BCHW = torch.zeros(2, 3, model.image_size, model.image_size)
    example_BCHW = example_BCHW.to(torch.uint8) if with_preprocessing else example_BCHW
    try:
        program = torch.export.export(graph, (example_BCHW,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # tracing runs the network's own code, which may raise anything
        raise UserError(f"torch.export cannot trace this network ({_first_line(error)}).") from error
    torch.export.save(program, folder / PT2)
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    try:
        torch.onnx.export(program, (), folder / ONNX, **names, external_data=False, verbose=False)
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        raise UserError(f"ONNX cannot hold this network ({_onnx_reason(error)}); nothing was exported.") from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")


def _onnx_reason(error: BaseException) -> str:
    """The line that names a missing operator, from the exporter's chain of errors, else the first line."""
    chain: BaseException | None = error
    while chain is not None:
        for line in str(chain).splitlines():
            if "No ONNX function found" in line:
                return line[line.index("No ONNX function found") :].split(". ")[0]
        chain = chain.__cause__
    return _first_line(error)


def runs_of(folder: Path) -> dict[str, Run]:
    """Each file of the folder, read again, as a function."""
    return {WEIGHTS: load(folder), ONNX: _onnx_run(folder / ONNX), PT2: torch.export.load(folder / PT2).module()}


def _onnx_run(path: Path) -> Run:
    import onnx
    import onnxruntime

    onnx.checker.check_model(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images_BCHW: torch.from_numpy(session.run(["logits"], {"images": images_BCHW.numpy()})[0])


@dataclass(frozen=True)
class Check:
    """How a file's logits compare with the model's on N images, one alone and all together."""

    largest_difference: float
    same_top1: int
    images: int

    def require(self, file: str) -> None:
        """Raise UserError where the file does not compute what the model does."""
        if self.same_top1 < self.images or not self.largest_difference <= TOLERANCE:  # NaN is refused too
            raise UserError(
                f"{file} differs from the model: by up to {self.largest_difference:.1e} in a logit (allowed: "
                f"{TOLERANCE:.0e}), same top class on {self.same_top1} of {self.images} images; nothing was exported."
            )


@torch.inference_mode()
def check(run: Run, inputs_BCHW: Tensor, expected_BK: Tensor) -> Check:
    """Compare a file's logits on these inputs with the expected ones."""
    alone_K, logits_BK = run(inputs_BCHW[:1])[0], run(inputs_BCHW)
    difference = max((logits_BK - expected_BK).abs().max().item(), (alone_K - expected_BK[0]).abs().max().item())
    same = int((logits_BK.argmax(dim=1) == expected_BK.argmax(dim=1)).sum())
    return Check(difference if torch.isfinite(logits_BK).all() else float("nan"), same, len(inputs_BCHW))


@dataclass(frozen=True)
class Latency:
    """Milliseconds of a call: quartiles over so many calls."""

    quartiles_ms: tuple[float, float, float]
    calls: int


@torch.inference_mode()
def latency(run: Run, inputs_BCHW: Tensor) -> Latency:
    """Time calls on this input, after two that are not counted."""
    for _ in range(2):
        run(inputs_BCHW)
    times_ms: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(times_ms) < FEWEST or (len(times_ms) < MOST and time.perf_counter() < end):
        start = time.perf_counter()
        run(inputs_BCHW)
        times_ms.append(1000 * (time.perf_counter() - start))
    low, median, high = statistics.quantiles(times_ms, n=4)
    return Latency((low, median, high), len(times_ms))


def latencies(run: Run, inputs_BCHW: Tensor) -> tuple[Latency, ...]:
    """Of batches of each size in BATCHES; the inputs are repeated where there are fewer."""
    return tuple(latency(run, inputs_BCHW[np.arange(size) % len(inputs_BCHW)]) for size in BATCHES)


def noise(model: Model, count: int) -> Tensor:
    """Random images uint8 [count, 3, S, S], always the same."""
    size: Sequence[int] = (count, 3, model.image_size, model.image_size)
    return torch.randint(256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
