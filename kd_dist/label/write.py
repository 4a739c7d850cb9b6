"""Who writes: all ranks of a job, each its share of the blocks; rank 0 makes one file of them."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from kd_dist.cache import Block, BlockWriter, CachePlan
from kd_dist.dist.endings import Interrupted, StopRequest
from kd_dist.dist.runtime import Runtime
from kd_dist.inference import ahead
from kd_dist.label.labeller import Labeller

GPU_BLOCKS_AT_ONCE = 2


def write_cache(
    target: Path,
    plan: CachePlan,
    labeller: Labeller,
    runtime: Runtime,
    stop: StopRequest,
    progress: Callable[[int, int], None],
) -> None:
    """Label what is missing, a share on each rank, and publish. Raises UserError where it cannot be written.

    Shards written before an interruption are kept, whatever the number of ranks was then.
    """
    # Rank 0 makes the folder of shards before the others look into it.
    runtime.on_main(lambda: BlockWriter(target, plan) and None)
    writer = BlockWriter(target, plan)
    missing = runtime.on_main(writer.missing)
    mine = [missing[position] for position in runtime.shard(len(missing))]
    with ThreadPoolExecutor(1) as files:  # a block is written while the next one is computed
        writing: deque[Future] = deque()
        for done, write in enumerate(_labelled(mine, writer, labeller, stop), start=1):
            writing.append(files.submit(write))
            if len(writing) > 1:
                writing.popleft().result()
            progress(done, len(mine))
        while writing:
            writing.popleft().result()
    runtime.wait_for_all()
    runtime.on_main(lambda: writer.publish() and None)


def _labelled(
    blocks: Sequence[Block], writer: BlockWriter, labeller: Labeller, stop: StopRequest
) -> Iterator[Callable[[], object]]:
    """What writes each block, its logits computed. On a GPU two are worked on at once: one's images are rendered, or
    its logits fetched, while the other is in the network. Raises Interrupted.
    """
    on_gpu = labeller.device.type == "cuda"

    def until_stopped() -> Iterator[Block]:
        for block in blocks:
            if stop.signal is not None:  # the ranks need not stop together: every shard that was written is safe
                raise Interrupted(stop.signal)
            yield block

    def compute(block: Block) -> Callable[[], object]:
        if on_gpu:
            torch.cuda.set_device(labeller.device)  # a thread begins on the first one
        if writer.is_known(block):
            return partial(writer.take_known, block)
        return partial(writer.put, block, labeller.block(block, writer.plan.tables[block.split]))

    return ahead(compute, until_stopped(), GPU_BLOCKS_AT_ONCE if on_gpu else 0)
