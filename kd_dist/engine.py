"""The one training loop. Teacher, hard-label twin and distilled student differ in the data and the loss handed in, not
in here.

Exactness. Order, views and blends are functions of (seed, epoch, image). A rank's loss is its part of the sum over the
whole batch divided by the batch's size, so N ranks' averaged gradients are one rank's gradients; BatchNorm alone sees
each rank's part. Running statistics are rank 0's. On a CPU a resumed run ends with the bits of the uninterrupted one at
the same number of ranks; GPU kernels that add in no fixed order do not promise that, nor does another number of ranks,
which adds in another order.
"""

import contextlib
import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kd_dist import checkpoint, events, views
from kd_dist.batches import Batch, EpochBatches, TrainData
from kd_dist.checkpoint import RunFolder
from kd_dist.errors import UserError
from kd_dist.inference import autocast, compute_dtype
from kd_dist.monitor import Monitor
from kd_dist.runtime import Interrupted, Runtime, StopRequest

LossTerms = Callable[[nn.Module, Batch], dict[str, Tensor]]
"""(model, batch with normalised pictures) -> named losses [B] of every sample, "total" among them."""

Evaluate = Callable[[nn.Module], dict[str, float]]
"""Validation: metrics by name, equal on all ranks; "val_" heads those of val, "tune_" those of a part of train."""

AfterEpoch = Callable[[int, nn.Module, dict[str, float]], None]
"""Told on rank 0, at the end of an epoch: how many are done, the evaluated model, its metrics."""

SCORES = ("val_", "tune_")

MOMENTUM = 0.9
GPU_STEPS_BETWEEN_AGREEMENTS = 20
HEARTBEAT_SECONDS = 30.0
SETTLING_STEPS = 2
TRACE_AFTER_STEPS, TRACED_STEPS = 20, 10


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to learn. Epochs are passes over the data, fractions allowed for the warm-up."""

    epochs: int
    lr: float
    weight_decay: float
    warmup_epochs: float
    ema: float
    seed: int
    checkpoint_minutes: float = 10.0

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """Linear warm-up, then half a cosine to zero (Loshchilov & Hutter 2017)."""
        warmup, total = self.warmup_epochs * steps_per_epoch, self.epochs * steps_per_epoch
        if step < warmup:
            return self.lr * (step + 1) / (warmup + 1)
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


class Ema:
    """A moving average of a model's weights and running statistics, with a short memory at first: min(decay, (1 + t) /
    (10 + t)).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        # Listed once: both models keep their tensors, and a walk through the modules in every step would cost more than
        # the update.
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._counters = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the model after its update number `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_([own for own, _ in self._averaged], [new for _, new in self._averaged], 1 - decay)
        for own, new in self._counters:
            own.copy_(new)


def make_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.SGD:
    """SGD with Nesterov momentum; weights of two and more dimensions decay, norms and biases do not."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    free = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM, nesterov=True, fused=True)


class Trainer:
    """Trains `model` on `data` under `schedule`, saves as it goes, and resumes what its folder holds.

    `stop` is looked at after every step. After `run`, `evaluated_model` is the result: the moving average where there
    is one, else the last weights.
    """

    def __init__(
        self,
        model: nn.Module,
        data: TrainData,
        loss_terms: LossTerms,
        evaluate: Evaluate,
        schedule: Schedule,
        runtime: Runtime,
        folder: RunFolder,
        *,
        stop: StopRequest,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        workers: int = 0,
        precision: str = "auto",
        compile_model: bool = False,
        trace: bool = False,
        after_epoch: AfterEpoch | None = None,
    ):
        self.after_epoch = after_epoch
        self.data, self.loss_terms, self.evaluate, self.schedule = data, loss_terms, evaluate, schedule
        self.runtime, self.folder, self.stop, self.workers = runtime, folder, stop, workers
        self.compute_dtype = compute_dtype(runtime.device, precision)
        self.model = model.to(runtime.device, memory_format=torch.channels_last)
        self.normalise = views.Normalise(mean, std, next(model.parameters()).dtype, runtime.device)
        self.ema = Ema(self.model, schedule.ema) if schedule.ema else None
        self.optimizer = make_optimizer(self.model, schedule.weight_decay)
        self.compile_model, self.trace = compile_model, trace and runtime.is_main
        self.parallel = self._parallel()
        self.settling_seconds = self._settle()
        self.steps_per_epoch = data.steps_per_epoch
        self.total_steps = schedule.epochs * self.steps_per_epoch
        self.agree_every = GPU_STEPS_BETWEEN_AGREEMENTS if runtime.device.type == "cuda" else 1
        self.step = 0
        self.sums = EpochSums()
        self.bad = FirstBadStep(runtime.device)
        self.monitor = Monitor(None, enabled=False)  # until `run` opens the run's own
        self.saved_at = self.beat_at = time.monotonic()

    @property
    def evaluated_model(self) -> nn.Module:
        return self.ema.model if self.ema else self.model

    def _parallel(self) -> nn.Module:
        """The model as training calls it: under DDP, compiled where that was asked for. Its weights are the model's."""
        parallel = self._under_ddp() if self.runtime.world_size > 1 else self.model
        return torch.compile(parallel) if self.compile_model else parallel

    def _under_ddp(self) -> DistributedDataParallel:
        devices = [self.runtime.device] if self.runtime.device.type == "cuda" else None
        with warnings.catch_warnings():  # newer releases rename broadcast_buffers, older ones know no other name
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(self.model, devices, broadcast_buffers=False, gradient_as_bucket_view=True)

    def _settle(self) -> float:
        """Take steps whose result is thrown away, where the first ones differ from the rest; gives their seconds.

        DDP regroups its gradient buckets after the first step, which changes the order of addition: a resumed run would
        differ from an uninterrupted one in the last bits at three ranks and more. Two steps bring both to the same
        buckets. A compiled model is built for each size of batch that occurs, the first one's and the last one's.
        """
        batches = EpochBatches(self.data, 0, self.runtime.rank, self.runtime.world_size)
        steps = [0] * SETTLING_STEPS if self.runtime.world_size > 1 else []
        if self.compile_model:
            steps += [0, len(batches) - 1]
        if not steps:
            return 0.0
        started = time.monotonic()
        untouched = copy.deepcopy(self.model.state_dict())
        for step in steps:
            self._thrown_away(self.prepare(batches[step]))
        self.model.load_state_dict(untouched)
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic() - started

    def _thrown_away(self, batch: Batch) -> None:
        try:
            with autocast(self.runtime.device, self.compute_dtype):
                loss = self.loss_terms(self.parallel, batch)["total"].mean()
            loss.backward()
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"torch.compile cannot build this network here ({reason}); leave --compile out.") from error
        self.model.zero_grad(set_to_none=True)

    # ---- the loop

    def run(self) -> None:
        """Train to the end. Raises UserError (diverged, cannot save) and Interrupted (asked to stop, all saved)."""
        self._resume()
        self.saved_at = self.beat_at = time.monotonic()
        with (
            Monitor(self.folder.path, enabled=self.runtime.is_main, resume_step=self.step) as self.monitor,
            self._tracer() as self.tracer,
        ):
            if self.compile_model:
                self.monitor.line(f"compiled in {self.settling_seconds:.1f} s, which images/s do not count")
            if self.step:
                self.monitor.line(f"going on from step {self.step} of {self.total_steps}{self._other_ranks()}")
            if self._at_epochs_end() and not self._is_noted():
                self._close_epoch()
            while self.step < self.total_steps:
                self._train_epoch()
                self._close_epoch()
        if any(self.runtime.gather(self.stop.signal)):
            self._stop()

    def _tracer(self):
        """A profiler of some steps once the run is warm, in rank 0 and where one was asked for."""
        if not self.trace:
            return contextlib.nullcontext()
        first = min(TRACE_AFTER_STEPS, (self.total_steps - self.step) // 2)
        plan = torch.profiler.schedule(skip_first=first, wait=0, warmup=1, active=TRACED_STEPS, repeat=1)
        return torch.profiler.profile(schedule=plan, on_trace_ready=self._keep_trace)

    def _keep_trace(self, profiler: torch.profiler.profile) -> None:
        try:
            checkpoint.write_trace(self.folder, profiler.export_chrome_trace)
            self.monitor.line(f"traced some steps: open {self.folder.trace} at https://ui.perfetto.dev")
        except (OSError, RuntimeError) as error:
            self.monitor.line(f"no trace was written, the run goes on: {error}")

    def _at_epochs_end(self) -> bool:
        return self.step > 0 and self.step % self.steps_per_epoch == 0

    def _train_epoch(self) -> None:
        epoch, first_step = divmod(self.step, self.steps_per_epoch)
        self.sums.start_clock()
        batches = self._prepared(self.data.epoch(epoch, self.runtime, self.workers, first_step))
        with self.monitor.epoch(epoch + 1, self.schedule.epochs, self.steps_per_epoch, first_step) as progress:
            for done in range(first_step + 1, self.steps_per_epoch + 1):
                with self.sums.waiting():
                    batch = next(batches)
                self.train_step(batch)
                if self.trace:
                    self.tracer.step()
                if self.step % self.agree_every == 0 or done == self.steps_per_epoch:
                    self.agree()
                    progress.update(done, self.sums.mean("total"), self.sums.images_per_second)

    def _prepared(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches ready for the network. On a GPU each is copied and rendered on a stream of its own, while the
        step before it runs.
        """
        if self.runtime.device.type != "cuda":
            yield from map(self.prepare, batches)
            return
        main, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(main)  # what is resident was put there by the main stream

        def begin() -> Batch | None:
            with torch.cuda.stream(side):
                batch = next(batches, None)
                return None if batch is None else self.prepare(batch)

        coming = begin()
        while coming is not None:
            main.wait_stream(side)
            for tensor in coming.tensors().values():
                tensor.record_stream(main)
            yield coming  # the step is enqueued here, and the next batch beside it
            coming = begin()

    def prepare(self, batch: Batch) -> Batch:
        """The batch on the device, its pictures normalised."""
        batch = batch.to(self.runtime.device)
        return replace(batch, images_BCHW=self.normalise(batch.images_BCHW))

    def train_step(self, batch: Batch) -> None:
        """Forward, backward and update on a prepared batch."""
        self._seed_step()
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.lr_at(self.step, self.steps_per_epoch)
        with autocast(self.runtime.device, self.compute_dtype):
            terms = {name: values_B.sum() for name, values_B in self.loss_terms(self.parallel, batch).items()}
        # DDP averages over ranks; each rank's sum over the whole batch's size, times the ranks, averages to the batch's
        # mean.
        (terms["total"] * self.runtime.world_size / batch.global_size).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.ema:
            self.ema.update(self.step)
        self.sums.add(terms, len(batch.labels_B))
        self.bad.look(self.step, terms)

    def _seed_step(self) -> None:
        """Dropout and its like draw from (seed, step, rank), so that a resumed run draws the same."""
        words = np.random.SeedSequence([self.schedule.seed, self.step, self.runtime.rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(words[0]))

    # ---- what the ranks agree on

    def agree(self) -> None:
        """Put the ranks' sums together and act together: end on a bad loss, save when it is time, stop when asked to.

        An epoch's last step is saved ahead of its evaluation, which may take longer than a scheduler waits.
        """
        minutes = (time.monotonic() - self.saved_at) / 60
        time_to_save = self.runtime.is_main and minutes > self.schedule.checkpoint_minutes
        stop, save, bad = self._shared([self.stop.signal is not None, time_to_save, self.bad.seen()])
        if bad:
            self._report_divergence()
        self._beat()
        if self.step % GPU_STEPS_BETWEEN_AGREEMENTS == 0:
            self.monitor.scalars(self.step, {f"step/{name}": value for name, value in self.sums.recent.items()})
        if stop or save or self._at_epochs_end():
            self._save()
        if stop:
            self._stop()

    def _shared(self, flags: list[bool]) -> list[bool]:
        """Which of the flags any rank raised; the ranks' sums are put together on the way."""
        shared = self.runtime.sum(torch.cat([torch.tensor(flags, dtype=torch.float64), self.sums.take_local()]))
        self.sums.add_shared(shared[len(flags) :])
        return [bool(count > 0) for count in shared[: len(flags)]]

    def _report_divergence(self) -> None:
        records = [record for record in self.runtime.gather(self.bad.record()) if record]
        step, terms = min(records, key=lambda record: record[0])
        shown = ", ".join(f"{name} {value:.4g}" for name, value in sorted(terms.items()))
        raise UserError(
            f"training diverged at step {step} (epoch {(step - 1) // self.steps_per_epoch + 1}), loss terms {shown}; "
            f"{self._last_good()}"
        )

    def _last_good(self) -> str:
        steps = self.folder.saved_steps()
        last = f"the last good checkpoint is {self.folder.checkpoint(steps[-1])}" if steps else "there is no checkpoint"
        return f"{last}; lower --lr or raise --warmup-epochs, in another --out or with --start-over."

    def _stop(self) -> None:
        raise Interrupted(max(self.runtime.gather(self.stop.signal or 0)))

    # ---- epochs' ends, checkpoints

    def _close_epoch(self) -> None:
        """Evaluate, and note the epoch's metrics."""
        started = time.monotonic()
        self.runtime.take_from_main(list(self.evaluated_model.buffers()))
        metrics = self.evaluate(self.evaluated_model)
        epoch, lr = self.step // self.steps_per_epoch, self.optimizer.param_groups[0]["lr"]
        # What an epoch takes where nothing interrupts it: its steps and its evaluation, without the saves.
        epoch_s = self.sums.seconds + time.monotonic() - started
        row = {"step": self.step, "epoch": epoch, **metrics, **self.sums.row(), "epoch_s": epoch_s, "lr": lr}
        self.sums = EpochSums()
        if self.runtime.is_main:
            if self.after_epoch:
                self.after_epoch(epoch, self.evaluated_model, metrics)
            self._note_epoch(row)  # last: an epoch without its row is closed again

    def _is_noted(self) -> bool:
        """Whether the step's epoch has its row, or was stopped after its checkpoint and before that."""
        return self.runtime.on_main(lambda: self.step in {row["step"] for row in checkpoint.read_metrics(self.folder)})

    def _note_epoch(self, row: dict[str, Any]) -> None:
        checkpoint.append_metrics(self.folder, row)
        names = {name: name.replace("_", "/", 1) for name in row if name.startswith((*SCORES, "train_"))}
        self.monitor.scalars(self.step, {shown: row[name] for name, shown in names.items()})
        speed = {"speed/images_per_s": row["images_per_s"], "speed/data_wait_s": row["data_wait_s"], "lr": row["lr"]}
        self.monitor.scalars(self.step, speed)
        scores = [name.partition("_") for name in row if name.startswith(SCORES)]
        shown = ", ".join(f"{name} {row[head + _ + name]:.4f}" for head, _, name in scores)
        self.monitor.line(
            f"epoch {row['epoch']}/{self.schedule.epochs}: loss {row['train_total']:.4f}, {scores[0][0]} {shown}, "
            f"{row['images_per_s']:.0f} images/s, waited {row['data_wait_s']:.1f} s for data"
        )
        self.monitor.flush()  # the checkpoint of this step is written already: a resume from it will not log this again

    def _save(self) -> None:
        """Write a checkpoint on rank 0; a failure there is raised on all ranks."""
        if not all(bool(torch.isfinite(value).all()) for value in self.evaluated_model.state_dict().values()):
            raise UserError(f"training diverged: weights are not finite after step {self.step}; {self._last_good()}")
        self.runtime.on_main(self._write_checkpoint)
        self.saved_at = time.monotonic()
        self.sums.start_clock()

    def _write_checkpoint(self) -> None:
        self.monitor.flush()
        payload = {
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "epoch_sums": self.sums.state(),
            "world_size": self.runtime.world_size,
        }
        checkpoint.save_checkpoint(self.folder, self.step, payload)
        self._write_state("running")

    def _resume(self) -> None:
        warn = (lambda text: print(f"kd_dist: {text}", flush=True)) if self.runtime.is_main else None
        newest = checkpoint.newest_checkpoint(self.folder, warn)
        step = newest[1]["step"] if newest else 0
        if len(set(self.runtime.gather(step))) > 1:
            raise UserError(
                f"the ranks see different checkpoints in {self.folder.path}; put --out on a disk that all nodes share."
            )
        if self.runtime.is_main:
            checkpoint.truncate_metrics(self.folder, step)
        if newest is None:
            return
        payload = newest[1]
        self.model.load_state_dict(payload["model"])
        if self.ema:
            self.ema.model.load_state_dict(payload["ema"])
        self.optimizer.load_state_dict(payload["optimizer"])
        self.step, self.saved_world_size = step, payload["world_size"]
        if self.runtime.is_main:
            events.emit(self.folder.path, events.Code.RESUMED, step=step)
        if not (self._at_epochs_end() and self._is_noted()):
            self.sums = EpochSums(**payload["epoch_sums"])

    def _other_ranks(self) -> str:
        before, now = self.saved_world_size, self.runtime.world_size
        return f"; saved by {before} ranks, now {now}: the same batches, but not to the bit" if before != now else ""

    def _beat(self) -> None:
        if self.runtime.is_main and time.monotonic() - self.beat_at > HEARTBEAT_SECONDS:
            self.beat_at = time.monotonic()
            with contextlib.suppress(UserError):  # a heartbeat may fail; the next checkpoint will say why
                self._write_state("running")

    def _write_state(self, status: str, **facts: Any) -> None:
        epoch = self.step / self.steps_per_epoch
        checkpoint.write_state(self.folder, status, step=self.step, epoch=epoch, epochs=self.schedule.epochs, **facts)


class EpochSums:
    """Sums over the current epoch: of images and loss terms over all ranks, and of this rank's clock.

    Terms are added up on the device and fetched only when the ranks agree, so that no step waits for the device. The
    clock is read then too, when the device has done what was counted.
    """

    def __init__(self, names=(), totals=(), seconds: float = 0.0, wait_seconds: float = 0.0):
        self.names, self.totals = list(names), list(totals)  # totals[0] counts images, the rest go with names
        self.seconds, self.wait_seconds = seconds, wait_seconds
        self.recent: dict[str, float] = {}
        self._local: Tensor | None = None  # on the device
        self._count = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that an epoch cut in two reports the sums of the whole."""
        return {"names": self.names, "totals": self.totals, "seconds": self.seconds, "wait_seconds": self.wait_seconds}

    def start_clock(self) -> None:
        """Training goes on from now; what came before, a save say, does not count."""
        self._since = time.monotonic()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts what happens within as waiting for data."""
        started = time.monotonic()
        yield
        self.wait_seconds += time.monotonic() - started

    def add(self, terms: Mapping[str, Tensor], count: int) -> None:
        """Add one step: loss terms summed over this rank's `count` images."""
        self.names = sorted(terms)
        values = torch.stack([terms[name].detach().double() for name in self.names])
        self._local = values if self._local is None else self._local + values
        self._count += count

    def take_local(self) -> Tensor:
        """What this rank added since the last call, float64 [1 + terms] on the CPU."""
        local = torch.cat([torch.tensor([self._count], dtype=torch.float64), self._local.cpu()])
        now = time.monotonic()
        self.seconds, self._since = self.seconds + now - self._since, now
        self._local, self._count = None, 0
        return local

    def add_shared(self, sums: Tensor) -> None:
        """Take in what all ranks added; `recent` becomes the mean of each term over these images alone."""
        self.totals = [old + new for old, new in zip(self.totals or [0.0] * len(sums), sums.tolist(), strict=True)]
        self.recent = dict(zip(self.names, (sums[1:] / sums[0]).tolist(), strict=True))

    @property
    def images_per_second(self) -> float:
        return self.totals[0] / max(self.seconds, 1e-9)

    def mean(self, name: str) -> float:
        """The mean of a loss term over the epoch's images so far."""
        return self.totals[1 + self.names.index(name)] / max(self.totals[0], 1)

    def row(self) -> dict[str, float]:
        """The epoch's training metrics."""
        means = {f"train_{name}": self.mean(name) for name in self.names}
        return {**means, "images_per_s": self.images_per_second, "data_wait_s": self.wait_seconds}


class FirstBadStep:
    """Keeps, on the device, the first step whose loss was not finite and its terms: looking costs no wait."""

    def __init__(self, device: torch.device):
        self.step = torch.full((), -1, dtype=torch.int64, device=device)
        self.names: list[str] = []
        self.terms: Tensor | None = None

    def look(self, step: int, terms: Mapping[str, Tensor]) -> None:
        """Remember this step if it is the first whose total is not finite."""
        self.names = sorted(terms)
        values = torch.stack([terms[name].detach().double() for name in self.names])
        first = ~torch.isfinite(terms["total"]) & (self.step < 0)
        self.terms = values if self.terms is None else torch.where(first, values, self.terms)
        self.step = torch.where(first, step, self.step)

    def seen(self) -> bool:
        """Whether there was one; waits for the device."""
        return int(self.step) >= 0

    def record(self) -> tuple[int, dict[str, float]] | None:
        """The step and this rank's summed loss terms there, None where this rank saw none."""
        return (int(self.step), dict(zip(self.names, self.terms.tolist(), strict=True))) if self.seen() else None
