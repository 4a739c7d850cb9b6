"""The one training loop. Teacher, hard-label baseline and distilled student differ in the data and the loss handed in,
not in here.

Exactness. Order, views and mixes are functions of (seed, epoch, image). A rank's loss is its part of the sum over the
whole batch divided by the batch's size, so N ranks' averaged gradients are one rank's gradients; BatchNorm alone sees
each rank's part. Running statistics are rank 0's. On a CPU a resumed run ends with the bits of the uninterrupted one at
the same number of ranks. A GPU does not promise that, because some kernels add in no fixed order and cuDNN chooses the
fastest ones by timing; nor does another number of ranks, which adds in another order.
"""

import contextlib
import copy
import functools
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kd_dist.dist.endings import Interrupted, StopRequest
from kd_dist.dist.runtime import Runtime
from kd_dist.errors import UserError
from kd_dist.images import views
from kd_dist.inference import autocast, compute_dtype, input_dtype
from kd_dist.run import checkpoint, events
from kd_dist.run.curves import Description, curves_of
from kd_dist.run.folder import RunFolder
from kd_dist.run.metrics import append_metrics, read_metrics, sync_metrics, truncate_metrics
from kd_dist.run.monitor import Monitor
from kd_dist.tables import counted
from kd_dist.training import health
from kd_dist.training.batches import Batch, EpochBatches, TrainData
from kd_dist.training.device_input import prepared
from kd_dist.training.optimiser import Ema, Optimisation, make_optimizer
from kd_dist.training.profiling import Trace
from kd_dist.training.randomness import StepRandomness
from kd_dist.training.saving import Checkpoints, Heartbeat
from kd_dist.training.watch import EpochSums, LossWatch, StepClock, norm_of, weights_are_finite

LossTerms = Callable[[nn.Module, Batch], dict[str, Tensor]]
"""(model, batch with normalised images) -> named losses [B] of every sample, "total" among them."""

Evaluate = Callable[[int, nn.Module], dict[str, float]]
"""Validation after an epoch: (epochs done, evaluated model) -> metrics by name, equal on all ranks; "val_" begins the
names of those of val, "tune_" those of a part of train. Empty where this epoch is not evaluated."""

SCORES = ("val_", "tune_")

GPU_STEPS_BETWEEN_SYNCS = 20
DDP_WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Execution:
    """How the work is done: how images are normalised, in which precision the network runs (auto, bf16 or fp32), how
    many loader processes a rank has, how often a checkpoint is saved, and whether some steps are traced.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    workers: int = 0
    precision: str = "auto"
    checkpoint_minutes: float = 2.0
    profile: bool = False


class Trainer:
    """Trains `model` on `data`, saves as it goes, and resumes what its folder holds.

    After `run`, `evaluated_model` is the result: the moving average where there is one, else the last weights.
    """

    def __init__(
        self,
        model: nn.Module,
        data: TrainData,
        loss_terms: LossTerms,
        evaluate: Evaluate,
        optimisation: Optimisation,
        execution: Execution,
        runtime: Runtime,
        folder: RunFolder,
    ):
        self.data, self.loss_terms, self.evaluate, self.optimisation = data, loss_terms, evaluate, optimisation
        self.execution, self.runtime, self.folder = execution, runtime, folder
        self.compute_dtype = compute_dtype(runtime.device, execution.precision)
        self.model = model.to(runtime.device).to(memory_format=torch.channels_last)
        self.parallel = under_ddp(self.model, runtime) if runtime.world_size > 1 else self.model
        keep_counters_on_host(self.model)
        dtype = input_dtype(self.model, runtime.device, self.compute_dtype)
        self.normalise = views.Normalise(execution.mean, execution.std, dtype, runtime.device)
        self.ema = Ema(self.model, optimisation.ema) if optimisation.ema else None
        self.optimizer = make_optimizer(self.model, optimisation.weight_decay)
        self.randomness = StepRandomness(optimisation.seed, runtime.rank, runtime.device)
        self.steps_per_epoch = data.steps_per_epoch
        self.total_steps = optimisation.epochs * self.steps_per_epoch
        self.sync_every = GPU_STEPS_BETWEEN_SYNCS if runtime.device.type == "cuda" else 1
        self.step = 0
        self.sums, self.losses, self.clock = EpochSums(), LossWatch(), StepClock(runtime.device)
        # `run` opens the run's own.
        self.stop, self.monitor = StopRequest(), Monitor(None, enabled=False)
        self.checkpoints: Checkpoints | None = None
        self.peak_images_per_s: float | None = None

    @property
    def evaluated_model(self) -> nn.Module:
        return self.ema.model if self.ema else self.model

    @property
    def images_seen(self) -> int:
        """Training images seen so far, by all ranks: the horizontal axis of curves."""
        epochs, steps = divmod(self.step, self.steps_per_epoch)
        smallest, larger = divmod(len(self.data), self.steps_per_epoch)  # so many batches have one image more
        return epochs * len(self.data) + steps * smallest + min(steps, larger)

    # ---- the loop

    def run(self, stop: StopRequest, description: Description | None = None) -> None:
        """Train to the end. Raises UserError (diverged, cannot save) and Interrupted (asked to stop, all saved)."""
        self.stop = stop
        self._warm_up_ddp()
        resumed = self._resume()
        if self.runtime.is_main:
            self.peak_images_per_s = health.peak_images_per_s(
                self.model, self.data.image_size, self.runtime.device, self.compute_dtype, self.runtime.world_size
            )
        with self._collaborators():
            if resumed:
                self.monitor.line(resumed)
            self.monitor.describe(self.images_seen, description or Description())
            if self._at_epochs_end() and not self._has_row():
                self._end_epoch()
            while self.step < self.total_steps:
                self._train_epoch()
                self._end_epoch()
            self.runtime.on_main(self._finish_writing)
            self.monitor.finished(self.images_seen)
        if any(self.runtime.gather(self.stop.signal)):
            self._interrupt()

    def _train_epoch(self) -> None:
        epoch, first_step = divmod(self.step, self.steps_per_epoch)
        self._start_clocks()
        batches = self.batches(epoch, first_step)
        shown = self.monitor.epoch(epoch + 1, self.optimisation.epochs, self.steps_per_epoch, first_step)
        with shown as progress, fastest_kernels():
            for done in range(first_step + 1, self.steps_per_epoch + 1):
                self.train_step(next(batches))
                self.trace.step()
                if self.step % self.sync_every == 0 or done == self.steps_per_epoch:
                    self.sync()
                    progress.update(done, self.sums.mean("total"), self.sums.images_per_second)

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """This rank's batches of an epoch from `first_step` on, ready for the network."""
        batches = self.data.epoch(epoch, self.runtime, self.execution.workers, first_step)
        return prepared(self.sums.waited_for(batches), self.prepare, self.runtime.device)

    def prepare(self, batch: Batch) -> Batch:
        """The batch on the device, its images normalised."""
        batch = batch.to(self.runtime.device)
        return replace(batch, images_BCHW=self.normalise(batch.images_BCHW))

    def train_step(self, batch: Batch) -> None:
        """Forward, backward and update on a prepared batch."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.optimisation.lr_at(self.step, self.steps_per_epoch)
        begin = self.clock.mark()
        with self.randomness.of(self.step):
            losses = self._losses(batch)
            loss_known = self.clock.mark()
            # The gradient of the batch's mean by each loss, times the ranks, because DDP averages over them.
            share = share_of_mean(batch.global_size, self.runtime.world_size, losses["total"].dtype)
            losses["total"].backward(torch.full_like(losses["total"], share))
        if self._measures_gradient(self.step + 1):
            self.losses.note_gradient(self.model)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.ema:
            self.ema.update(self.step)
        self.losses.add(self.step, losses)
        self.clock.add(begin, loss_known, self.clock.mark())

    def _measures_gradient(self, step: int) -> bool:
        """Whether this step's gradient is measured: now and then, and at an epoch's end."""
        return step % GPU_STEPS_BETWEEN_SYNCS == 0 or step % self.steps_per_epoch == 0

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        with autocast(self.runtime.device, self.compute_dtype):
            return self.loss_terms(self.parallel, batch)

    # ---- what the ranks do together

    def _warm_up_ddp(self) -> None:
        """Take steps without effect where there are several ranks.

        DDP regroups its gradient buckets after the first step, which changes the order of addition: a resumed run would
        differ from an uninterrupted one in the last bits at three ranks and more. Two steps bring both to the same
        buckets.
        """
        if self.runtime.world_size == 1:
            return
        batches = EpochBatches(self.data, 0, self.runtime.rank, self.runtime.world_size)
        before = copy.deepcopy(self.model.state_dict())
        for _ in range(DDP_WARM_UP_STEPS):
            self._losses(self.prepare(batches[0]))["total"].mean().backward()
            self.model.zero_grad(set_to_none=True)
        self.model.load_state_dict(before)

    def sync(self) -> None:
        """Add up the ranks' sums and act together: end on a bad loss, save when it is time, stop when asked to."""
        mine = self.losses.fetch()
        self.sums.stop_clock()
        self.clock.read()
        self.sums.grad_norm = self.losses.fetch_grad_norm() or self.sums.grad_norm
        flags = {
            "stop": self.stop.signal is not None,
            "diverged": self.losses.first_bad is not None,
            "unwritten": self.checkpoints is not None and self.checkpoints.has_failed(),
            "save": self._is_time_to_save(),
        }
        shared = self.runtime.sum(torch.cat([torch.tensor([*flags.values()], dtype=torch.float64), mine]))
        flags = dict(zip(flags, (shared[: len(flags)] > 0).tolist(), strict=True))
        self.sums.add(self.losses.names, shared[len(flags) :])
        if flags["diverged"]:
            self._report_divergence()
        if flags["unwritten"]:
            self.runtime.on_main(self._finish_writing)
        if self.step % GPU_STEPS_BETWEEN_SYNCS == 0:
            recent = {**self.sums.recent, "grad_norm": self.sums.grad_norm or 0.0}
            self.monitor.scalars(self.images_seen, {f"3_steps/{name}": value for name, value in recent.items()})
        if flags["save"] or flags["stop"]:
            self._save()
        elif self.checkpoints:
            self.heartbeat.beat(**self._position())
        if flags["stop"]:
            self.runtime.on_main(self._finish_writing)
            self._interrupt()

    def _start_clocks(self) -> None:
        self.sums.start_clock()
        self.clock.pause()

    def _is_time_to_save(self) -> bool:
        """Now and then, after the last step, and after an epoch that took longer than "now and then", because its
        evaluation may take longer than a scheduler waits. The first rank decides.
        """
        if self.checkpoints is None:
            return False
        is_long_epoch = self._at_epochs_end() and self.sums.seconds > self.checkpoints.seconds
        return self.step == self.total_steps or is_long_epoch or self.checkpoints.is_due()

    def _report_divergence(self) -> None:
        records = [record for record in self.runtime.gather(self.losses.first_bad) if record]
        step, terms = min(records, key=lambda record: record[0])
        shown = ", ".join(f"{name} {value:.4g}" for name, value in sorted(terms.items()))
        raise UserError(
            f"training diverged at step {step} (epoch {(step - 1) // self.steps_per_epoch + 1}), loss terms {shown}; "
            f"{self.runtime.on_main(self._last_good)}"
        )

    def _require_finite_weights(self) -> None:
        """All ranks judge together, because each has running statistics of its own."""
        bad = self.runtime.sum(torch.tensor(float(not weights_are_finite(self.evaluated_model))))
        if bad > 0:
            last_good = self.runtime.on_main(self._last_good)
            raise UserError(f"training diverged: weights are not finite after step {self.step}; {last_good}")

    def _last_good(self) -> str:
        with contextlib.suppress(UserError):  # divergence is what ends the run
            self._finish_writing()
        steps = self.folder.saved_steps()
        last = f"the last good checkpoint is {self.folder.checkpoint(steps[-1])}" if steps else "there is no checkpoint"
        return f"{last}; lower --lr or raise --warmup-epochs, in another --out or with --start-over."

    def _interrupt(self) -> None:
        raise Interrupted(max(self.runtime.gather(self.stop.signal or 0)))

    # ---- an epoch's end

    def _at_epochs_end(self) -> bool:
        return self.step > 0 and self.step % self.steps_per_epoch == 0

    def _end_epoch(self) -> None:
        """Evaluate, and keep the epoch's metrics: an epoch without its row is evaluated again on a resume."""
        started = time.monotonic()
        self._require_finite_weights()
        self.runtime.take_from_main(list(self.evaluated_model.buffers()))
        epoch, lr = self.step // self.steps_per_epoch, self.optimizer.param_groups[0]["lr"]
        metrics = self.evaluate(epoch, self.evaluated_model)
        metrics |= health.metrics_of(self.runtime.gather(health.health_of(self.clock, self.sums)), self.sums.seconds)
        metrics["weight_norm"] = float(norm_of([weight.detach() for weight in self.model.parameters()]))
        # What an epoch takes where nothing interrupts it: its steps and its evaluation, without the saves.
        epoch_s = self.sums.seconds + time.monotonic() - started
        row = {"step": self.step, "epoch": epoch, **metrics, **self.sums.row(), "epoch_s": epoch_s, "lr": lr}
        self.sums = EpochSums()
        self.clock.restart()
        self.runtime.on_main(lambda: self._keep_row(row))

    def _has_row(self) -> bool:
        """Whether the step's epoch has its row, or was stopped after its checkpoint and before that."""
        return self.runtime.on_main(lambda: self.step in {row["step"] for row in read_metrics(self.folder)})

    def _keep_row(self, row: dict[str, Any]) -> None:
        if self.peak_images_per_s:
            row["model_flops_share"] = row["images_per_s"] / self.peak_images_per_s
        trained_s = row["train_s"] + sum(earlier.get("train_s", 0.0) for earlier in read_metrics(self.folder))
        with contextlib.suppress(OSError):  # a failing disk costs these figures, not the run
            row |= events.standing(events.read(self.folder.events), trained_s)
        append_metrics(self.folder, row)
        self.monitor.scalars(self.images_seen, curves_of(row))
        scores = [name.partition("_") for name in row if name.startswith(SCORES)]
        scores.sort(key=lambda score: score[2] != "loss")  # beside the training loss
        shown = "".join(f" {prefix} {name} {row[prefix + _ + name]:.4f}," for prefix, _, name in scores)
        self.monitor.line(
            f"epoch {row['epoch']}/{self.optimisation.epochs}: train loss {row['train_total']:.4f},{shown} "
            f"{row['images_per_s']:.0f} images/s, waited {row.get('data_wait_s', 0.0):.1f} s for data"
        )
        self.monitor.flush()  # this step may have its checkpoint already: a resume from it will not log this again

    # ---- what stays on disk

    @contextlib.contextmanager
    def _collaborators(self) -> Iterator[None]:
        """What watches and saves the run while it trains; at the end all is on disk, or an error says what is not."""
        folder, main = self.folder, self.runtime.is_main
        traces = main and self.execution.profile
        with (
            ThreadPoolExecutor(1, "disk") as disk,
            Monitor(folder.path, enabled=main, resume_at=self.images_seen) as self.monitor,
            Trace(folder, self.total_steps - self.step, self.monitor.line, enabled=traces) as self.trace,
        ):
            self.heartbeat = Heartbeat(folder, disk)
            self.checkpoints = Checkpoints(folder, self.execution.checkpoint_minutes, disk) if main else None
            yield

    def _save(self) -> None:
        """Have rank 0 save a checkpoint; an error of the one before it is raised on all ranks."""
        self._require_finite_weights()
        self.runtime.on_main(self._save_checkpoint)
        self._start_clocks()

    def _save_checkpoint(self) -> None:
        self.monitor.flush()
        payload = {
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "epoch_sums": self.sums.state(),
            "world_size": self.runtime.world_size,
        }
        position = self._position()
        assert self.checkpoints is not None  # rank 0 has them within `run`
        self.checkpoints.save(self.step, payload, then=lambda: self.heartbeat.write(**position))

    def _position(self) -> dict[str, float]:
        return {"step": self.step, "epoch": self.step / self.steps_per_epoch, "epochs": self.optimisation.epochs}

    def _finish_writing(self) -> None:
        if self.checkpoints:
            self.checkpoints.wait()
            sync_metrics(self.folder)

    def _resume(self) -> str | None:
        """Take up the newest checkpoint; gives a sentence on it, None where there is none. Raises UserError."""
        warn = (lambda text: print(f"kd_dist: {text}", flush=True)) if self.runtime.is_main else None
        newest = checkpoint.newest_checkpoint(self.folder, warn)
        step = newest[1]["step"] if newest else 0
        if len(set(self.runtime.gather(step))) > 1:
            raise UserError(
                f"the ranks see different checkpoints in {self.folder.path}; put --out on a shared file system."
            )
        if self.runtime.is_main:
            truncate_metrics(self.folder, step)
        if newest is None:
            return None
        payload = newest[1]
        self.model.load_state_dict(payload["model"])
        if self.ema:
            self.ema.model.load_state_dict(payload["ema"])
        self.optimizer.load_state_dict(payload["optimizer"])
        self.step = step
        if not (self._at_epochs_end() and self._has_row()):
            self.sums = EpochSums(**payload["epoch_sums"])
        before, now = payload["world_size"], self.runtime.world_size
        if self.runtime.is_main:
            events.emit(self.folder.path, events.Code.RESUMED, step=step)
        ranks = (
            f"; the checkpoint was saved with {counted(before, 'rank')}, this run has {now}: same batches, not bitwise "
            "identical"
            if before != now
            else ""
        )
        return f"resuming from step {step} of {self.total_steps}{ranks}"


@functools.cache
def share_of_mean(count: int, factor: int, dtype: torch.dtype) -> float:
    """factor / count, rounded twice in the losses' type as autograd would for `losses.sum() * factor / count`."""
    return float(torch.ones((), dtype=dtype) / count * factor)


def keep_counters_on_host(model: nn.Module) -> None:
    """Keep BatchNorm's counts of batches on the CPU: no layer here reads them, and counting would be a launch each."""
    for module in model.modules():
        if getattr(module, "num_batches_tracked", None) is not None and module.momentum is not None:
            module.num_batches_tracked = module.num_batches_tracked.cpu()


def under_ddp(model: nn.Module, runtime: Runtime) -> DistributedDataParallel:
    """The model as several ranks call it; its weights become rank 0's."""
    devices = [runtime.device] if runtime.device.type == "cuda" else None
    with warnings.catch_warnings():  # newer releases rename broadcast_buffers, older ones know no other name
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(model, devices, broadcast_buffers=False, gradient_as_bucket_view=True)


@contextlib.contextmanager
def fastest_kernels() -> Iterator[None]:
    """Within, cuDNN times its convolutions for each new shape and takes the fastest, unless deterministic ones are
    asked for. Not for logits that are kept: those come from `inference`, whose kernels are chosen without timing.
    """
    cudnn = torch.backends.cudnn
    before, cudnn.benchmark = cudnn.benchmark, not cudnn.deterministic
    try:
        yield
    finally:
        cudnn.benchmark = before
