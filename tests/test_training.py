"""How training saves, traces and ends, and what it leaves out for speed. What it computes: test_exactness.py."""

import json
import threading

import numpy as np
import pytest
import torch

from kd_dist import inference
from kd_dist.config import MEAN, STD
from kd_dist.dist.endings import StopRequest
from kd_dist.errors import UserError
from kd_dist.images import views
from kd_dist.models import Cnn5
from kd_dist.run import checkpoint
from kd_dist.run.folder import RunFolder
from kd_dist.training import Trainer, objectives, profiling, saving, watch
from kd_dist.training.profiling import TRACED_STEPS
from tests.ranks import run_ranks
from tests.test_exactness import K, make_trainer, random_data


def small_trainer(runtime, folder, epochs=3, **execution) -> Trainer:
    """A trainer for epochs of seven steps."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = Cnn5(K, channels=(4, 4, 8, 8, 8))
    return make_trainer(runtime, folder, model, random_data(150, 24, 32), objectives.hard(K, 0.0), epochs, **execution)


def trained(runtime, folder, **execution) -> Trainer:
    """Three epochs of seven steps; gives the trainer."""
    trainer = small_trainer(runtime, folder, **execution)
    trainer.run(StopRequest())
    return trainer


# ---- checkpoints


def test_training_goes_on_while_a_checkpoint_is_written(one_process, tmp_path, monkeypatch):
    """The write lasts until five more steps are taken; a trainer that waited for it would never take them."""
    trainer = small_trainer(one_process, tmp_path, checkpoint_minutes=1e-9)
    save, loss_terms, went_on = checkpoint.save_checkpoint, trainer.loss_terms, threading.Event()
    saved = []

    def slow(folder, step, payload):
        assert went_on.wait(60), "training waited for the disk"
        saved.append(step)
        save(folder, step, payload)

    def counting(model, batch):
        if trainer.step == 6:
            assert saved == []
            went_on.set()
        return loss_terms(model, batch)

    monkeypatch.setattr(checkpoint, "save_checkpoint", slow)
    trainer.loss_terms = counting
    trainer.run(StopRequest())
    assert saved[0] == 1 and saved[-1] == 21
    _, payload = checkpoint.newest_checkpoint(RunFolder(tmp_path))  # the run has waited for the last write
    assert payload["step"] == 21


def test_a_checkpoint_holds_the_weights_of_its_own_step(one_process, tmp_path, monkeypatch):
    trainer = small_trainer(one_process, tmp_path, checkpoint_minutes=1e-9)
    save, loss_terms, went_on, weights = checkpoint.save_checkpoint, trainer.loss_terms, threading.Event(), []

    def late(folder, step, payload):
        went_on.wait(60)
        save(folder, step, payload)
        weights.append((step, payload["model"]["classifier.weight"]))

    def counting(model, batch):
        if trainer.step == 1:
            counting.after_first_step = trainer.model.classifier.weight.detach().clone()
        if trainer.step == 4:
            went_on.set()
        return loss_terms(model, batch)

    monkeypatch.setattr(checkpoint, "save_checkpoint", late)
    trainer.loss_terms = counting
    trainer.run(StopRequest())
    step, saved = weights[0]
    assert step == 1 and torch.equal(saved, counting.after_first_step)
    assert not torch.equal(saved, trainer.model.classifier.weight)


@pytest.mark.parametrize(("minutes", "steps"), [(1000, [21]), (1e-9, [20, 21])])
def test_saves_are_by_time_and_at_the_end(one_process, tmp_path, monkeypatch, minutes, steps):
    """Not at the end of each epoch. A disk without delay takes a checkpoint each step, of which two are kept."""
    monkeypatch.setattr(saving.Checkpoints, "_is_idle", lambda self: self._writing is None or self.wait() is None)
    trained(one_process, tmp_path, checkpoint_minutes=minutes)
    assert RunFolder(tmp_path).saved_steps() == steps


def test_an_epoch_longer_than_the_time_between_saves_ends_with_one(one_process, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(checkpoint, "save_checkpoint", lambda folder, step, payload: saved.append(step))
    monkeypatch.setattr(saving.Checkpoints, "is_due", lambda self: False)
    trained(one_process, tmp_path, checkpoint_minutes=1e-9)
    assert saved == [7, 14, 21]


def test_a_write_that_fails_ends_the_run_at_the_next_synchronisation(one_process, tmp_path, monkeypatch):
    trainer = small_trainer(one_process, tmp_path, checkpoint_minutes=1e-9)
    failed = threading.Event()

    def full(folder, step, payload):
        failed.set()
        raise UserError("no space left")

    def waiting(model, batch):
        if trainer.step > 0:
            failed.wait(60)
        return objectives.hard(K, 0.0)(model, batch)

    monkeypatch.setattr(checkpoint, "save_checkpoint", full)
    trainer.loss_terms = waiting
    with pytest.raises(UserError, match="no space left"):
        trainer.run(StopRequest())
    assert trainer.step < 7


def end_with_broken_statistics(runtime, folder):
    """Train with a running mean that is not finite on the last rank alone; gives the error."""
    trainer = small_trainer(runtime, folder)
    trainer.optimizer.register_step_post_hook(
        lambda *_: runtime.rank and trainer.model.norms[0].running_mean.fill_(float("nan"))
    )
    try:
        trainer.run(StopRequest())
    except UserError as error:
        return str(error)


def test_weights_that_are_not_finite_on_one_rank_end_all_ranks(tmp_path):
    (message,) = set(run_ranks(2, end_with_broken_statistics, tmp_path / "run"))
    assert "weights are not finite after step 7" in message and "there is no checkpoint" in message


def test_large_finite_weights_are_finite():
    model = torch.nn.Linear(4, 4)
    torch.nn.init.constant_(model.weight, 3e38)  # the sum of squares overflows
    assert watch.weights_are_finite(model)
    model.weight.data[1, 2] = float("nan")
    assert not watch.weights_are_finite(model)


# ---- what is left out for speed


class Dropping(torch.nn.Module):
    """A network that draws random numbers."""

    def __init__(self):
        super().__init__()
        self.network = Cnn5(K, channels=(4, 4, 8, 8, 8))

    def forward(self, images_BCHW):
        return self.network(torch.nn.functional.dropout(images_BCHW, 0.1, self.training))


@pytest.mark.parametrize(("network", "seeds"), [(Cnn5, 1), (Dropping, 7)])
def test_only_a_network_that_draws_is_seeded_in_each_step(one_process, tmp_path, monkeypatch, network, seeds):
    (tmp_path / "checkpoints").mkdir()
    model = Dropping() if network is Dropping else Cnn5(K, channels=(4, 4, 8, 8, 8))
    trainer = make_trainer(one_process, tmp_path, model, random_data(150, 24, 32), objectives.hard(K, 0.0))
    seeded, seed = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda number: seeded.append(number) or seed(number))
    trainer.run(StopRequest())
    assert len(set(seeded)) == len(seeded) == seeds


def test_kernels_are_timed_in_training_and_never_for_logits_that_are_kept(one_process, tmp_path):
    trainer = small_trainer(one_process, tmp_path, epochs=1)
    cudnn, seen = torch.backends.cudnn, {"train": set(), "evaluate": set()}
    data = trainer.data

    def note(module, inputs):
        seen["train" if module.training else "evaluate"].add((cudnn.benchmark, cudnn.deterministic))

    def evaluate(epoch, model):
        model.register_forward_pre_hook(note)
        forward = inference.Forward(model, data.pixels, 32, MEAN, STD, one_process.device)
        forward.all_logits(views.Shown.plain(*crops(data, 6)), K, one_process)
        return {"val_top1": 0.0}

    trainer.evaluate = evaluate
    trainer.model.register_forward_pre_hook(note)
    trainer.run(StopRequest())
    assert seen == {"train": {(True, False)}, "evaluate": {(False, True)}}
    assert (cudnn.benchmark, cudnn.deterministic) == (False, False)


def crops(data, count: int):
    """(rows, boxes, flips) of whole images."""
    index_N = np.arange(count)
    box_N4 = np.concatenate([np.zeros((count, 2), np.int64), data.pixels.sizes_N2[:count]], axis=1)
    return index_N, box_N4, np.zeros(count, np.uint8)


# ---- traces and work ahead


def test_a_trace_of_warm_steps_is_kept(one_process, tmp_path):
    trained(one_process, tmp_path, profile=True)
    trace = json.loads(RunFolder(tmp_path).trace.read_text())  # Chrome's format, which Perfetto opens
    names = [event.get("name", "") for event in trace["traceEvents"]]
    steps = {name for name in names if name.startswith("ProfilerStep#")}
    assert 1 <= len(steps) <= TRACED_STEPS and "ProfilerStep#0" not in steps
    assert any(name.startswith("aten::") for name in names)
    assert RunFolder(tmp_path).trace in RunFolder(tmp_path).products()


def test_a_trace_that_cannot_be_written_costs_only_the_trace(one_process, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(profiling, "write_trace", lambda folder, export: (_ for _ in ()).throw(OSError("full")))
    assert trained(one_process, tmp_path, profile=True).step == 21
    assert "no trace was written" in capsys.readouterr().out


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_work_ahead_keeps_its_order_and_its_errors(threads):
    assert list(inference.ahead(lambda item: item * 2, range(10), threads)) == list(range(0, 20, 2))
    with pytest.raises(ZeroDivisionError):
        list(inference.ahead(lambda item: 1 // item, [1, 2, 0, 3], threads))
