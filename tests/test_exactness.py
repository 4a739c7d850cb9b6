"""N ranks give one rank's result, and a resumed run the uninterrupted one's: bitwise where that is promised."""

import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from kd_dist import label
from kd_dist.cache import BlockWriter, TeacherRow, open_cache
from kd_dist.config import MEAN, STD
from kd_dist.data.generated import generate
from kd_dist.data.scan import scan
from kd_dist.dist.endings import Interrupted, StopRequest
from kd_dist.dist.runtime import joined
from kd_dist.errors import UserError
from kd_dist.images import views
from kd_dist.images.store import Pixels, build_pixels, open_pixels
from kd_dist.inference import Forward
from kd_dist.job import Data
from kd_dist.models import Cnn5
from kd_dist.run import checkpoint
from kd_dist.run.curves import HEALTH, TAGS
from kd_dist.run.folder import RunFolder
from kd_dist.run.metrics import read_metrics
from kd_dist.training import Execution, Optimisation, Trainer, objectives
from kd_dist.training import trainer as trainer_module
from kd_dist.training.batches import CachedCrops, FreshCrops, TrainData
from kd_dist.training.losses import kl
from tests.ranks import run_ranks

K = 10


def random_data(n: int, batch_size: int, image_size: int) -> TrainData:
    """N noise images of two shapes, with random labels and cached rows: what they show does not matter here."""
    rng = np.random.default_rng(0)
    sizes_N2 = np.array([(10, 12), (12, 10)], np.int64)[np.arange(n) % 2]
    starts_N = np.arange(n) * 10 * 12 * 3
    pixels = Pixels(torch.from_numpy(rng.integers(0, 256, n * 10 * 12 * 3, dtype=np.uint8)), sizes_N2, starts_N)
    box_NV4, flip_NV = views.cached_views(0, "train", sizes_N2, range(4), (0.5, 1.0))
    logits_NVK = rng.normal(size=(n, 4, K)).astype(np.float16)
    crops = CachedCrops(box_NV4, flip_NV, seed=0)
    return TrainData(pixels, rng.integers(0, K, n), crops, image_size, batch_size, seed=0, logits_NVK=logits_NVK)


def fresh_mixed_data(n: int, batch_size: int, image_size: int) -> TrainData:
    """As random_data, on fresh crops with mixup and CutMix, for a hard loss."""
    data = random_data(n, batch_size, image_size)
    crops = FreshCrops(data.pixels.sizes_N2, (0.5, 1.0), seed=0)
    return TrainData(data.pixels, data.labels_N, crops, image_size, batch_size, seed=0, mixup=0.3, cutmix=0.3)


def make_trainer(runtime, folder, model, data, loss, epochs=1, **execution) -> Trainer:
    plan = Optimisation(epochs=epochs, lr=0.05, weight_decay=5e-4, warmup_epochs=0.5, ema=0.9, seed=0)
    evaluate = lambda epoch, model: {"val_top1": 0.0}  # noqa: E731
    return Trainer(model, data, loss, evaluate, plan, Execution(MEAN, STD, **execution), runtime, RunFolder(folder))


# ---- N ranks = 1 rank


def gradients_and_weights(runtime, folder, mixed):
    """All gradients of one epoch and the weights after it, of a network without batch statistics in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, K)
    ).double()
    data = (fresh_mixed_data if mixed else random_data)(1001, 64, 8)
    loss = objectives.hard(K, 0.1) if mixed else objectives.distilled(K, 0.0, kl, alpha=0.7, temperature=3.0)
    trainer = make_trainer(runtime, folder, model, data, loss)
    gradients = []
    collect = lambda *_: gradients.append([p.grad.clone() for p in model.parameters()])  # noqa: E731
    trainer.optimizer.register_step_pre_hook(collect)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    trainer.run(StopRequest())
    metrics = read_metrics(RunFolder(folder))[-1] if runtime.is_main else None
    return gradients, [p.detach() for p in model.parameters()], metrics


@pytest.mark.parametrize("mixed", [False, True], ids=["cached", "fresh-mixed"])
def test_n_ranks_have_one_ranks_gradients(tmp_path, mixed):
    (one,) = run_ranks(1, gradients_and_weights, tmp_path / "1", mixed)
    assert len(one[0]) == 16  # ceil(1001 / 64)
    for world_size in (2, 3):
        many = run_ranks(world_size, gradients_and_weights, tmp_path / str(world_size), mixed)
        for gradients, weights, _ in many:
            for step_one, step_many in zip(one[0], gradients, strict=True):
                for a, b in zip(step_one, step_many, strict=True):
                    assert (a - b).abs().max() < 1e-10
            for a, b in zip(one[1], weights, strict=True):
                assert (a - b).abs().max() < 1e-10
        for name in ("train_total", "train_hard"):
            assert many[0][2][name] == pytest.approx(one[2][name], abs=1e-6)


@pytest.fixture(scope="module")
def tiny_set(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("set") / "tiny"
    generate(root, train_per_class=31, val_per_class=6, seed=0)
    return root


def open_tiny(root: Path) -> Data:
    samples = scan(root)
    pixels = {}
    for split in ("train", "val"):
        build_pixels(samples.split(split), root / ".kd_dist", 1, lambda done, total: None)
        pixels[split] = open_pixels(samples.split(split), root / ".kd_dist")
    return Data(samples, pixels)


def small_teacher(classes) -> label.Teacher:
    torch.manual_seed(1)
    model = Cnn5(len(classes), channels=(4, 8, 8, 16, 16)).eval()
    with torch.no_grad():
        model.classifier.weight.mul_(100)  # an untrained network's logits hardly differ between images
    row = TeacherRow(checkpoint.weights_digest(model.state_dict()), "cnn5", 1, -1, 32, 0.0)
    return label.Teacher(model, row, MEAN, STD, tuple(classes), (0.4, 1.0), "2026-01-01T00:00:00+00:00")


def write_and_predict(runtime, root, target):
    data = open_tiny(root)
    teacher = small_teacher(data.samples.classes)
    plan = label.plan([teacher], data, label.ViewRule(3, (0.4, 1.0), seed=5), "float32")
    labeller = label.Labeller([teacher], data, plan.header, runtime.device)
    label.write_cache(target, plan, labeller, runtime, StopRequest(), lambda done, total: None)
    forward = Forward(teacher.model, data.pixels["val"], 32, MEAN, STD, runtime.device)
    table = plan.tables["val"]
    shown = views.Shown.plain(np.arange(len(table)), table.box_NV4[:, 0], table.flip_NV[:, 0])
    return forward.all_logits(shown, K, runtime)


def test_cache_bytes_and_val_logits_are_the_same_at_any_number_of_ranks(tiny_set, tmp_path):
    open_tiny(tiny_set)
    (alone,) = run_ranks(1, write_and_predict, tiny_set, tmp_path / "1.h5")
    for world_size in (2, 3):
        target = tmp_path / f"{world_size}.h5"
        for logits_NK in run_ranks(world_size, write_and_predict, tiny_set, target):
            assert np.array_equal(alone, logits_NK)
        assert target.read_bytes() == (tmp_path / "1.h5").read_bytes()


def test_a_cached_row_is_the_teacher_run_on_that_view(tiny_set, tmp_path):
    with joined("cpu") as runtime:
        write_and_predict(runtime, tiny_set, tmp_path / "logits.h5")
    cache, data = open_cache(tmp_path / "logits.h5"), open_tiny(tiny_set)
    teacher = small_teacher(data.samples.classes)
    normalise = views.Normalise(MEAN, STD, torch.float32, torch.device("cpu"))
    for split in ("train", "val"):
        table = cache.split(split)
        for i, v in ((0, 0), (7, 1), (40, 2), (len(table) - 1, 2)):
            top, left, height, width = table.box_NV4[i, v]
            crop_HWC = data.pixels[split][i][top : top + height, left : left + width]
            whole_view = (0, 0, height, width)
            image_CHW = views.render(crop_HWC, whole_view, table.flip_NV[i, v], 32)
            with torch.inference_mode():
                logits_1K = teacher.model(normalise(image_CHW[None]))
            stored_K = table.logits_NVK[i, v].astype(np.float32)
            assert np.allclose(logits_1K[0], stored_K, rtol=2e-3, atol=0.01)
            others = np.delete(table.logits_NVK[:, v], i, axis=0).astype(np.float32)
            closest_other = np.abs(others - logits_1K[0].numpy()).max(axis=1).min()
            assert closest_other > 0.02  # no other image's row would pass


def write_and_die(root, target, puts):
    """Write a cache alone until so many blocks are down, then end as a killed process does."""
    original = BlockWriter.put

    def put(self, block, logits_BK):
        nonlocal puts
        if puts == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        puts -= 1
        original(self, block, logits_BK)

    BlockWriter.put = put
    with joined("cpu") as runtime:
        write_and_predict(runtime, root, target)


def test_a_killed_cache_writer_loses_nothing_and_goes_on_at_another_number_of_ranks(tiny_set, tmp_path):
    whole, cut = tmp_path / "whole.h5", tmp_path / "cut.h5"
    run_ranks(1, write_and_predict, tiny_set, whole)
    process = multiprocessing.get_context("spawn").Process(target=write_and_die, args=(tiny_set, cut, 4))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL and not cut.exists()
    (labelled,) = set(run_ranks(2, count_labelled, tiny_set, cut))
    assert labelled == 2  # six blocks in all, four were safe
    assert cut.read_bytes() == whole.read_bytes()


def count_labelled(runtime, root, target):
    """Write a cache; gives the number of blocks that had to be computed, over all ranks."""
    computed = []
    original = label.Labeller.block
    label.Labeller.block = lambda *arguments: computed.append(1) or original(*arguments)
    write_and_predict(runtime, root, target)
    return sum(runtime.gather(len(computed)))


# ---- resumed = uninterrupted


def train_model(runtime, folder, stop_after_step=None, warm_up=True, keep_optimizer=True):
    """Train a network with BatchNorm, DDP and EMA on mixed crops; stop at a step if told to. Gives its state, None
    when stopped.
    """
    if not warm_up:
        trainer_module.DDP_WARM_UP_STEPS = 0
    torch.manual_seed(0)
    model = Cnn5(K, channels=(8, 16, 16, 32, 32))
    data = random_data(150, 24, 32)
    loss = objectives.distilled(K, 0.0, kl, alpha=0.7, temperature=3.0)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)

    def stopping_loss(model, batch):
        if (
            stop_after_step is not None
            and trainer.step == stop_after_step - 1
            and runtime.rank == runtime.world_size - 1
        ):
            os.kill(os.getpid(), signal.SIGTERM)  # one rank alone hears of it
        return loss(model, batch)

    with StopRequest() as stop:
        trainer = make_trainer(runtime, folder, model, data, loss, epochs=3)
        trainer.loss_terms = stopping_loss
        if not keep_optimizer:
            trainer.optimizer.load_state_dict = lambda state: None
        try:
            trainer.run(stop)
        except Interrupted:
            assert trainer.step == stop_after_step
            return None
    everything = {
        **model.state_dict(),
        **{f"ema.{name}": value for name, value in trainer.ema.model.state_dict().items()},
    }
    return {name: value.clone() for name, value in everything.items()}, _rows(runtime, folder)


def _rows(runtime, folder):
    clocks = {*HEALTH, "images_per_s", "data_wait_share", "train_s", "epoch_s"} - {"grad_norm", "weight_norm"}
    rows = read_metrics(RunFolder(folder)) if runtime.is_main else []
    return [{name: value for name, value in row.items() if name not in clocks} for row in rows]


def curve_positions(folder) -> dict[str, list[int]]:
    """The positions of every curve's points, as TensorBoard shows them."""
    shown = EventAccumulator(str(folder)).Reload()
    return {tag: [event.step for event in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}


def same(a, b) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def whole_and_resumed(world_size, tmp_path, stop_after_step, **how):
    whole = run_ranks(world_size, train_model, tmp_path / "whole")[0]
    assert run_ranks(world_size, train_model, tmp_path / "cut", stop_after_step) == [None] * world_size
    resumed = run_ranks(world_size, _train_with, tmp_path / "cut", how)[0]
    return whole, resumed


def _train_with(runtime, folder, how):
    return train_model(runtime, folder, **how)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_resumed_in_mid_epoch_ends_with_the_same_bits(tmp_path, world_size):
    (whole, whole_rows), (resumed, resumed_rows) = whole_and_resumed(world_size, tmp_path, stop_after_step=10)
    assert same(whole, resumed)
    assert whole_rows == resumed_rows and [row["epoch"] for row in whole_rows] == [1, 2, 3]


@pytest.mark.parametrize("last_step", [7, 21], ids=["first epoch", "last epoch"])
def test_stopped_at_the_end_of_an_epoch_it_is_evaluated_on_resuming(tmp_path, last_step):
    """The checkpoint comes ahead of the evaluation; nothing of the epoch is lost, in the last one neither."""
    world_size = 3 if last_step == 7 else 1
    (whole, whole_rows), (resumed, resumed_rows) = whole_and_resumed(world_size, tmp_path, stop_after_step=last_step)
    assert same(whole, resumed) and whole_rows == resumed_rows


def test_rows_after_the_newest_checkpoint_are_computed_again(tmp_path):
    """A killed run has rows of epochs that no checkpoint covers."""
    whole, whole_rows = run_ranks(1, train_model, tmp_path / "whole")[0]
    run_ranks(1, train_model, tmp_path / "cut", 10)
    shutil.copy(tmp_path / "whole" / "metrics.jsonl", tmp_path / "cut" / "metrics.jsonl")
    resumed, resumed_rows = run_ranks(1, train_model, tmp_path / "cut")[0]
    assert same(whole, resumed) and whole_rows == resumed_rows


def test_the_comparison_can_fail(tmp_path):
    """A resume that forgets the momentum must be seen."""
    (whole, _), (resumed, _) = whole_and_resumed(1, tmp_path, stop_after_step=10, keep_optimizer=False)
    assert not same(whole, resumed)


def test_without_ddp_warm_up_three_ranks_differ(tmp_path):
    """The reason for the warm-up: without it DDP adds in another order after a resume."""
    whole = run_ranks(3, train_model, tmp_path / "whole", None, False)[0]
    run_ranks(3, train_model, tmp_path / "cut", 10, False)
    resumed = run_ranks(3, train_model, tmp_path / "cut", None, False)[0]
    assert not same(whole[0], resumed[0])


def test_resumes_at_another_number_of_ranks(tmp_path):
    """Not bitwise (sums in another order, BatchNorm over other parts), but from the same step and over the same
    batches.
    """
    run_ranks(3, train_model, tmp_path / "cut", 10)
    state, rows = run_ranks(2, train_model, tmp_path / "cut")[0]
    assert [row["step"] for row in rows] == [7, 14, 21]
    assert all(torch.isfinite(value).all() for value in state.values())


def test_curves_stay_single_at_another_number_of_ranks(tmp_path):
    """An attempt's points after its last checkpoint are dropped, those before it stay, and one process an attempt wrote
    them.
    """
    run_ranks(1, train_model, tmp_path / "whole")
    run_ranks(3, train_model, tmp_path / "cut", 10)
    run_ranks(2, train_model, tmp_path / "cut")
    whole, cut = curve_positions(tmp_path / "whole"), curve_positions(tmp_path / "cut")
    assert cut == whole and len(cut[TAGS["train_total"]]) == 3 and len(cut["3_steps/total"]) == 1
    assert len(list((tmp_path / "cut").glob("events.out.tfevents.*"))) == 2


# ---- all ranks end together


def diverge(runtime, folder):
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    data = random_data(150, 24, 32)
    hard = objectives.hard(K, 0.0)

    def loss(model, batch):
        terms = hard(model, batch)
        broken = trainer.step == 9 and runtime.rank == runtime.world_size - 1
        return {**terms, "total": terms["total"] * float("nan")} if broken else terms

    trainer = make_trainer(
        runtime, folder, Cnn5(K, channels=(4, 4, 4, 4, 4)), data, hard, epochs=3, checkpoint_minutes=1e-9
    )
    trainer.loss_terms = loss
    try:
        trainer.run(StopRequest())
    except UserError as error:
        return str(error)


def test_nan_on_one_rank_ends_all_ranks_with_one_message(tmp_path):
    messages = set(run_ranks(2, diverge, tmp_path / "run"))
    assert len(messages) == 1
    (message,) = messages
    assert "diverged at step 10 (epoch 2)" in message and "total nan" in message
    path, payload = checkpoint.newest_checkpoint(RunFolder(tmp_path / "run"))
    assert str(path) in message  # which of the first nine depends on the disk
    assert payload["step"] <= 9 and all(torch.isfinite(value).all() for value in payload["model"].values())
