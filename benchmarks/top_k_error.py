"""What a soft loss loses by a cache of the top k: against all logits, for temperatures from 1 to 8.

    python -m benchmarks.top_k_error --classes 1000

The teacher's logits are generated: normal noise, a handful of likely classes well above it, as trained networks give.
The student's are the teacher's, halved, and noise, so that there is something left to learn. Prints a table.
"""

import argparse
from collections.abc import Iterator

import numpy as np
import torch

from kd_dist.cache.topk import TopK, shorten
from kd_dist.training.losses import kl

TEMPERATURES = (1, 2, 3, 4, 5, 6, 7, 8)
LIKELY = 12


def logits_of(rows: int, classes: int, rng: np.random.Generator) -> np.ndarray:
    """A teacher's logits, float16 [rows, classes]: noise of deviation 1.5, and a few classes up to 10 above it."""
    logits_RK = rng.normal(0, 1.5, (rows, classes))
    likely_RL = rng.integers(0, classes, (rows, LIKELY))
    raised_RL = np.take_along_axis(logits_RK, likely_RL, axis=1) + np.linspace(10, 2, LIKELY)
    np.put_along_axis(logits_RK, likely_RL, raised_RL, axis=1)
    return logits_RK.astype(np.float16)


def errors(teacher_RK: np.ndarray, student_RK: torch.Tensor, k: int) -> Iterator[tuple[float, float, float, float]]:
    """For each temperature: the tail's mass, the dense loss, the error of the loss and of its gradient, as shares."""
    columns = (column[:, None] for column in shorten(teacher_RK, k))
    short = TopK(*columns, teacher_RK.shape[1])
    rows_R = np.arange(len(teacher_RK))
    for temperature in TEMPERATURES:
        found = []
        for logits_RK in (teacher_RK, short.at(temperature)[rows_R, np.zeros_like(rows_R)]):
            own_RK = student_RK.clone().requires_grad_()
            loss = kl(own_RK, torch.from_numpy(logits_RK).double(), temperature).mean()
            found.append((float(loss.detach()), torch.autograd.grad(loss, own_RK)[0]))
        (dense, gradient), (near, other) = found
        p_RK = torch.softmax(torch.from_numpy(teacher_RK).double() / temperature, dim=1)
        tail = float(1 - p_RK.topk(k, dim=1).values.sum(dim=1).mean())
        yield tail, dense, (near - dense) / dense, float((other - gradient).norm() / gradient.norm())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.top_k_error", description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=1000, help="[1000]")
    parser.add_argument("--rows", type=int, default=2000, help="[2000]")
    parser.add_argument("--top-k", type=int, nargs="+", default=[8, 16, 32, 64, 128], metavar="K")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    teacher_RK = logits_of(options.rows, options.classes, rng)
    student_RK = torch.from_numpy(teacher_RK / 2 + rng.normal(0, 1, teacher_RK.shape))
    print("| k | bytes | T | mass of the tail | dense loss | error of the loss | error of the gradient |")
    print("|---|---|---|---|---|---|---|")
    for k in options.top_k:
        size = sum(column[0].nbytes for column in shorten(teacher_RK[:1], k))
        for temperature, figures in zip(TEMPERATURES, errors(teacher_RK, student_RK, k), strict=True):
            tail, dense, loss, gradient = figures
            print(f"| {k} | {size} | {temperature} | {tail:.3f} | {dense:.3f} | {loss:+.2%} | {gradient:.2%} |")


if __name__ == "__main__":
    main()
