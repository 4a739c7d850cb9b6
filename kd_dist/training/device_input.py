"""Batches made ready for the network. On a GPU the next one is copied and rendered while the step before it runs."""

import functools
from collections import deque
from collections.abc import Callable, Iterator

import torch

from kd_dist.training.batches import Batch

STEPS_AHEAD = 2
"""The host enqueues so many steps on a GPU before it waits for the oldest one: enough to hide the host's work, and a
bound on the memory that waits with them."""


def prepared(batches: Iterator[Batch], prepare: Callable[[Batch], Batch], device: torch.device) -> Iterator[Batch]:
    """prepare(batch) of every batch. On a GPU that happens on a stream of its own, one batch ahead of the caller."""
    return _on_side_stream(batches, prepare, device) if device.type == "cuda" else map(prepare, batches)


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which a process prepares batches.

    One for all its runs: the allocator keeps the freed blocks of each stream apart.
    """
    return torch.cuda.Stream(device)


def _on_side_stream(
    batches: Iterator[Batch], prepare: Callable[[Batch], Batch], device: torch.device
) -> Iterator[Batch]:
    main, side = torch.cuda.current_stream(device), side_stream(device)
    side.wait_stream(main)  # what is resident was put there by the main stream

    def begin() -> Batch | None:
        with torch.cuda.stream(side):
            batch = next(batches, None)
            return None if batch is None else prepare(batch)

    steps: deque[torch.cuda.Event] = deque()
    coming = begin()
    while coming is not None:
        main.wait_stream(side)
        for tensor in coming.tensors().values():
            tensor.record_stream(main)
        yield coming  # the step is enqueued here, and the next batch beside it
        steps.append(main.record_event())
        coming = begin()
        if len(steps) > STEPS_AHEAD:
            steps.popleft().synchronize()
