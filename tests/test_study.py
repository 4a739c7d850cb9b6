"""The study: arms that differ in one thing each, run once, resumed where they stopped, refused in one sentence."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch import nn

from kd_dist import config, distill, teacher
from kd_dist.cache import __main__ as cache_commands
from kd_dist.cache import open_cache
from kd_dist.config import StudentConfig, StudyConfig
from kd_dist.data.generated import generate
from kd_dist.dist.endings import Interrupted
from kd_dist.errors import UserError
from kd_dist.images import views
from kd_dist.label import load_teacher
from kd_dist.run.checkpoint import load_model, save_model
from kd_dist.run.claim import read_settings
from kd_dist.run.folder import RunFolder
from kd_dist.run.metrics import read_metrics
from kd_dist.run.state import read_state
from kd_dist.study import __main__ as entry
from kd_dist.study import arms, choice, online, runs
from kd_dist.study.arms import ARMS
from kd_dist.study.folder import StudyFolder, run_settings
from kd_dist.training import Trainer, objectives
from kd_dist.training.batches import Batch
from kd_dist.training.losses import kl
from tests.entries import call, refused

N, V, K = 12, 4, 3
TINY = ["--image-size", "32", "--batch-size", "12", "--lr", "0.02", "--device", "cpu", "--checkpoint-minutes", "1000"]
SETTINGS = StudyConfig.of(epochs=2, warmup_epochs=0.5, temperature=3.0, cutmix=0.5).resolved()
STUDENT = StudentConfig.of(temperature=3.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a tiny set of three classes (data) and a teacher's run (teacher) with a cache of four views."""
    folder = tmp_path_factory.mktemp("study")
    generate(folder / "data", train_per_class=8, val_per_class=3, classes=3, seed=0)
    teaching = ["--epochs", "1", "--views", "4", *TINY, "--image-size", "40"]
    call(teacher.main, "--data", folder / "data", "--out", folder / "teacher", *teaching)
    return folder


def words(made: Path, out: Path, *more) -> list:
    """A study's command line on what was made."""
    named = ["--data", made / "data", "--cache", made / "teacher" / "logits.h5", "--out", out]
    return [*named, "--epochs", "2", "--seeds", "0", *TINY, *more]


# ---- soft labels that replace the cached ones


@pytest.fixture(scope="module")
def rows() -> tuple[np.ndarray, np.ndarray]:
    """Cached rows in which each value is another one, and labels."""
    logits_NVK = np.random.default_rng(0).permutation(N * V * K).reshape(N, V, K).astype(np.float16) / 16
    return logits_NVK, np.array([0, 1, 2, 0, 0, 1, 2, 2, 1, 0, 2, 1])


def sources(made_NVK: np.ndarray, logits_NVK: np.ndarray) -> np.ndarray:
    """(image, view) int [N, V, 2] that each row was taken from, by its values."""
    place = {row.tobytes(): (n, v) for n, views in enumerate(logits_NVK) for v, row in enumerate(views)}
    return np.array([[place[row.tobytes()] for row in views] for views in made_NVK])


@pytest.mark.parametrize("name", ["shuffled-within", "shuffled-all"])
def test_shuffled_rows_are_all_those_of_another_image(rows, name):
    logits_NVK, labels_N = rows
    made_NVK = ARMS[name].soft_labels(logits_NVK, labels_N, STUDENT.changed(seed=5))
    image_NV, view_NV = np.moveaxis(sources(made_NVK, logits_NVK), 2, 0)
    assert (view_NV == np.arange(V)).all() and (image_NV == image_NV[:, :1]).all()
    other_N = image_NV[:, 0]
    assert sorted(other_N) == list(range(N)) and (other_N != np.arange(N)).all()
    same_class_N = labels_N[other_N] == labels_N
    assert same_class_N.all() if name == "shuffled-within" else not same_class_N.all()
    assert np.array_equal(made_NVK, ARMS[name].soft_labels(logits_NVK, labels_N, STUDENT.changed(seed=5)))
    assert not np.array_equal(made_NVK, ARMS[name].soft_labels(logits_NVK, labels_N, STUDENT.changed(seed=6)))


def test_shuffled_views_are_another_drawn_view_of_the_same_image(rows):
    logits_NVK, labels_N = rows
    found_NV2 = sources(ARMS["shuffled-view"].soft_labels(logits_NVK, labels_N, STUDENT), logits_NVK)
    assert (found_NV2[..., 0] == np.arange(N)[:, None]).all()
    drawn_NV = found_NV2[:, 1:, 1]
    assert (np.sort(drawn_NV, axis=1) == np.arange(1, V)).all() and (drawn_NV != np.arange(1, V)).all()
    assert len(np.unique(drawn_NV, axis=0)) == 2  # not the same move for every image


def test_class_mean_is_the_mean_over_the_class_and_its_drawn_views(rows):
    logits_NVK, labels_N = rows
    made_NVK = ARMS["class-mean"].soft_labels(logits_NVK, labels_N, STUDENT)
    for n in range(N):
        mean_K = logits_NVK[labels_N == labels_N[n], 1:].astype(np.float64).mean(axis=(0, 1))
        np.testing.assert_allclose(made_NVK[n], np.tile(mean_K, (V, 1)), rtol=1e-6)


def test_one_view_has_the_first_drawn_views_row_for_all(rows):
    logits_NVK, labels_N = rows
    found_NV2 = sources(ARMS["one-view"].soft_labels(logits_NVK, labels_N, STUDENT), logits_NVK)
    assert (found_NV2[..., 0] == np.arange(N)[:, None]).all() and (found_NV2[..., 1] == 1).all()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_smooth_is_the_smoothed_label_of_the_caches_mean_entropy(rows, temperature):
    logits_NVK, labels_N = rows
    made_NVK = ARMS["smooth"].soft_labels(logits_NVK, labels_N, STUDENT.changed(temperature=temperature))
    entropies = []
    for each_NVK in (made_NVK[:, 1:], logits_NVK[:, 1:]):
        p_NVK = softmax(each_NVK.astype(np.float64) / temperature, axis=2)
        entropies.append(-(p_NVK * np.log(p_NVK)).sum(axis=2).mean())
    assert entropies[0] == pytest.approx(entropies[1], rel=1e-5)
    p_NK = softmax(made_NVK[:, 0].astype(np.float64) / temperature, axis=1)
    assert (p_NK.argmax(axis=1) == labels_N).all()
    others_NK = p_NK[np.arange(K) != labels_N[:, None]].reshape(N, K - 1)
    np.testing.assert_allclose(others_NK, others_NK[0, 0], rtol=1e-5)


def test_the_ends_of_smoothing():
    assert arms.smoothing_of_entropy(0.0, 10) == arms.LEAST_SMOOTHING
    assert arms.smoothing_of_entropy(np.log(10) + 1e-9, 10) == 1.0
    # e = 0.1 at ten classes: 0.91 and nine times 0.01
    assert arms.smoothing_of_entropy(-0.91 * np.log(0.91) - 0.09 * np.log(0.01), 10) == pytest.approx(0.1)


def test_a_class_of_one_image_cannot_be_shuffled_within():
    classes, labels_N = ("beagle", "husky"), np.array([0, 1, 0])
    with pytest.raises(UserError, match=r"class husky has only one training image.* omit the arm shuffled-within"):
        arms.require_shuffled(ARMS["shuffled-within"], classes, labels_N)
    arms.require_shuffled(ARMS["shuffled-all"], classes, labels_N)
    arms.require_shuffled(ARMS["shuffled-within"], classes, np.array([0, 1, 0, 1]))


# ---- settings and losses


def test_an_arm_changes_what_it_says_and_nothing_else():
    of_arm = {name: run_settings(SETTINGS, arm, 3).stored() for name, arm in ARMS.items()}
    base = of_arm["distilled"]
    assert (base["seed"], base["out"], base["crops"], base["cutmix"]) == (
        3,
        "runs/study/distilled/seed-3",
        "cached",
        0.0,
    )
    differing = {
        name: {key for key in base if key != "out" and stored[key] != base[key]} for name, stored in of_arm.items()
    }
    fresh = {"crops", "cutmix"}
    assert differing.pop("baseline") == {"alpha", *fresh} and differing.pop("baseline-cached") == {"alpha"}
    assert differing.pop("online") == fresh  # mixed like baseline
    assert not any(differing.values())  # the others differ in soft labels or loss
    without = {name for name, arm in ARMS.items() if arm.soft_labels is None and arm.loss is None}
    assert without == {"baseline", "baseline-cached", "distilled", "online"}


@pytest.fixture
def batch() -> Batch:
    rng = np.random.default_rng(0)
    labels_B = torch.tensor([0, 1, 2, 1])
    return Batch(
        index_B=torch.arange(4),
        images_BCHW=torch.tensor(rng.normal(0, 1, (4, 3, 2, 2))).float(),
        labels_B=labels_B,
        partner_labels_B=labels_B,
        weights_B=torch.ones(4),
        teacher_logits_BK=torch.tensor(rng.normal(0, 2, (4, K))).half(),
        global_size=4,
    )


def gradients(terms, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict]:
    model.zero_grad()
    found = terms(model, batch)
    found["total"].sum().backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters()]), found


def test_no_gradient_learns_from_the_labels_alone(batch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, K))
    settings = run_settings(SETTINGS.changed(alpha=0.3), ARMS["no-gradient"], 0)
    gradient, found = gradients(ARMS["no-gradient"].loss(settings, K), model, batch)
    hard, _ = gradients(objectives.hard(K, 0.0), model, batch)
    np.testing.assert_allclose(gradient, 0.3 * hard, rtol=1e-5, atol=1e-7)
    q_BK, p_BK = (
        softmax(x.detach().double().numpy() / 3, axis=1) for x in (model(batch.images_BCHW), batch.teacher_logits_BK)
    )
    np.testing.assert_allclose(found["soft"], (q_BK * (np.log(q_BK) - p_BK)).mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(found["total"].detach(), 0.3 * found["hard"].detach() + 0.7 * found["soft"], rtol=1e-6)


@pytest.mark.parametrize("size", [32, 40])
def test_online_is_the_teachers_loss_on_the_very_images(made, tiny_pixels, size, batch):
    """The teacher sees 40 px: at 32 it has the mixed crops rendered again, at 40 it is handed the student's."""
    model_file = load_teacher(made / "teacher" / "model.pt", torch.device("cpu"))
    seen = online.OnlineTeacher(model_file, tiny_pixels["train"], torch.device("cpu"))
    settings = run_settings(SETTINGS, ARMS["online"], 0).changed(image_size=size)
    shown = views.Shown(
        np.array([3, 0, 7, 5]),
        np.array([[0, 0, 30, 20], [5, 2, 20, 30], [1, 1, 25, 25], [0, 4, 30, 30]], np.int16),
        np.array([0, 1, 0, 1], np.uint8),
        np.array([1, 0, 2, 5]),
        np.array([[2, 0, 20, 20], [5, 2, 20, 30], [3, 3, 20, 22], [0, 4, 30, 30]], np.int16),
        np.array([1, 1, 0, 1], np.uint8),
        np.array([0.75, 1, 0.3, 1], np.float32),
        np.array([[0.25, 0, 0.75, 0.5], [0] * 4, [0] * 4, [0] * 4], np.float32),
    )
    normalise = views.Normalise(config.MEAN, config.STD, torch.float32, torch.device("cpu"))
    images = {side: normalise(views.show(tiny_pixels["train"], shown, side)) for side in (size, 40)}
    batch = replace(batch, images_BCHW=images[size], shown=shown, teacher_logits_BK=None)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, K))
    gradient, found = gradients(seen(settings, K), model, batch)
    with torch.no_grad():
        teacher_BK = model_file.model(images[40])
    assert torch.equal(found["soft"], kl(model(images[size]), teacher_BK, 3.0))
    expected = objectives.distilled(K, 0.0, kl, settings.distillation.alpha, 3.0)
    assert torch.equal(gradient, gradients(expected, model, replace(batch, teacher_logits_BK=teacher_BK))[0])
    assert all(weight.grad is None for weight in model_file.model.parameters())


# ---- whole studies


class Looker:
    """Notes what every run begins with, the images and soft labels of its steps, and who was trained."""

    def __init__(self, monkeypatch):
        self.runs: dict[str, dict] = {}
        original = Trainer.run

        def run(trainer, stop, *description):
            name = trainer.folder.path.parent.name
            start = torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])
            steps, terms = [], trainer.loss_terms

            def looking(model, batch):
                steps.append((batch.index_B, batch.images_BCHW, batch.teacher_logits_BK))
                return terms(model, batch)

            trainer.loss_terms = looking
            self.runs[name] = {"start": start, "steps": steps}
            original(trainer, stop, *description)

        monkeypatch.setattr(Trainer, "run", run)

    def same(self, a: str, b: str, what: int) -> bool:
        pairs = zip(self.runs[a]["steps"], self.runs[b]["steps"], strict=True)
        return all(torch.equal(one[what], other[what]) for one, other in pairs)


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory) -> tuple[Path, Looker]:
    """All arms with one seed."""
    out = tmp_path_factory.mktemp("whole") / "study"
    with pytest.MonkeyPatch.context() as patch:
        looker = Looker(patch)
        call(entry.main, *words(made, out, "--teacher-model", made / "teacher" / "model.pt", "--cutmix", "0.5"))
    return out, looker


def test_arms_begin_alike_and_see_the_same_but_for_what_they_say(whole):
    _, looker = whole
    assert list(looker.runs) == list(ARMS)
    index, images, soft = range(3)
    for name, arm in ARMS.items():
        assert torch.equal(looker.runs[name]["start"], looker.runs["distilled"]["start"])
        assert looker.same(name, "distilled", index)
        twin = "baseline" if arm.changes.get("crops") == "fresh" else "distilled"
        assert looker.same(name, twin, images)
        read = [step[soft] for step in looker.runs[name]["steps"]]
        if name in ("baseline", "baseline-cached", "online"):
            assert read == [None] * 4
        else:
            assert looker.same(name, "distilled", soft) == (name in ("distilled", "no-gradient"))
    assert not looker.same("baseline", "distilled", images)


def test_a_studys_folder_says_what_was_asked_and_each_run_its_arm(whole):
    out, _ = whole
    study = json.loads((out / "study.json").read_text())
    assert (study["arms"], study["seeds"]) == (list(ARMS), [0])
    assert study["primary"] == ["distilled", "baseline"] and study["settings"]["epochs"] == 2
    assert Path(study["cache"]).name == "logits.h5"
    for name in ARMS:
        folder = StudyFolder(out).run(name, 0)
        assert read_state(folder)["status"] == "finished" and len(read_metrics(folder)) == 2
        assert read_settings(folder)[1]["study arm"] == name
        assert "val_agreement" in read_metrics(folder)[-1]
    table = StudyFolder(out).table.read_text()
    assert all(name in table for name in ARMS)


def test_a_finished_run_is_not_run_again_and_arms_and_seeds_may_be_added(made, whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "study"
    for name in ("baseline", "distilled"):
        shutil.copytree(whole[0] / name, out / name)
    looker = Looker(monkeypatch)
    more = ["--teacher-model", made / "teacher" / "model.pt", "--cutmix", "0.5"]
    call(entry.main, *words(made, out, *more, "--arms", "distilled,baseline"))
    assert looker.runs == {} and "distilled" in capsys.readouterr().out
    call(entry.main, *words(made, out, *more, "--arms", "distilled", "smooth", "--seeds", "0", "4", "--epochs", "2"))
    assert list(looker.runs) == ["smooth", "distilled"]  # smooth with both seeds, distilled with the new one
    study = json.loads((out / "study.json").read_text())
    assert (study["arms"], study["seeds"]) == (["baseline", "distilled", "smooth"], [0, 4])
    assert "--epochs was 2, now 3" in refused(entry.main, *words(made, out, *more, "--epochs", "3"))
    primary = refused(entry.main, *words(made, out, *more, "--primary", "one-view", "baseline"))
    assert '--primary was ["distilled", "baseline"], now ["one-view", "baseline"]' in primary
    shutil.move(out / "distilled" / "seed-4", out / "one-view" / "seed-4")
    foreign = refused(entry.main, *words(made, out, *more, "--arms", "one-view", "--seeds", "4"))
    assert 'study arm was "distilled", now "one-view"' in foreign


def test_a_study_of_an_older_version_is_gone_on_with(made, whole, tmp_path, capsys):
    """Settings that it did not have count as their defaults; the first run's lr was not the default."""
    out = tmp_path / "study"
    shutil.copytree(whole[0] / "distilled", out / "distilled")
    shutil.copy(whole[0] / "study.json", out)
    files = [out / "study.json", StudyFolder(out).run("distilled", 0).settings]

    def forget(name):
        for file in files:
            document = json.loads(file.read_text())
            del document["settings"][name]
            file.write_text(json.dumps(document))

    command = words(made, out, "--cutmix", "0.5", "--arms", "distilled")
    forget("weight_decay")
    call(entry.main, *command)
    assert "distilled, seed 0:" not in capsys.readouterr().out  # it is finished
    forget("lr")
    assert "--lr was 0.2, now 0.02" in refused(entry.main, *command)
    files[0].unlink()
    assert "--lr was 0.2, now 0.02" in refused(entry.main, *command)


def test_start_over_with_other_settings_removes_the_earlier_runs(made, tmp_path):
    out = tmp_path / "study"
    call(entry.main, *words(made, out, "--arms", "baseline", "one-view"))
    (out / "one-view" / "mine.txt").write_text("not a run's")
    (out / "other" / "seed-7").mkdir(parents=True)
    (out / "other" / "seed-7" / "model.pt").write_text("not a run's either")
    command = words(made, out, "--lr", "0.01", "--arms", "distilled")
    assert "or add --start-over to remove it and its runs." in refused(entry.main, *command)
    call(entry.main, *command, "--start-over")
    assert {*StudyFolder(out).runs()} == {"distilled", "other"} and not (out / "baseline" / "seed-0").exists()
    assert (out / "one-view" / "mine.txt").exists() and (out / "other" / "seed-7" / "model.pt").exists()
    assert "| baseline |" not in StudyFolder(out).table.read_text()


def test_another_cache_is_another_study(made, other_cache, tmp_path):
    out = tmp_path / "study"
    call(entry.main, *words(made, out, "--epochs", "1", "--arms", "baseline"))
    command = words(made, out, "--epochs", "1", "--arms", "distilled")
    command[command.index("--cache") + 1] = other_cache
    sentence = refused(entry.main, *command)
    digests = [open_cache(path).digest for path in (made / "teacher" / "logits.h5", other_cache)]
    assert f'cache digest was "{digests[0]}", now "{digests[1]}"' in sentence
    moved = shutil.copy(made / "teacher" / "logits.h5", tmp_path / "moved.h5")
    command[command.index("--cache") + 1] = moved
    call(entry.main, *command)
    assert {*StudyFolder(out).runs()} == {"baseline", "distilled"}


def test_a_failure_that_could_not_be_noted_is_reported(made, tmp_path, monkeypatch):
    """A full disk, say: the run's folder does not say that it failed."""
    original = distill.run

    def run(settings, *arguments, **more):
        if "one-view" in settings.out:
            raise UserError("no space left.")
        return original(settings, *arguments, **more)

    monkeypatch.setattr(distill, "run", run)
    sentence = refused(entry.main, *words(made, tmp_path, "--epochs", "1", "--arms", "one-view", "distilled"))
    assert sentence.startswith("1 of 2 runs failed (one-view, seed 0: no space left); ")
    assert read_state(StudyFolder(tmp_path).run("distilled", 0))["status"] == "finished"


@contextlib.contextmanager
def held_elsewhere(folder: RunFolder):
    """Another process that has the folder, until the end."""
    folder.path.mkdir(parents=True, exist_ok=True)
    hold = (
        "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX); "
        "print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(folder.lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    yield
    holder.communicate()


def test_a_run_that_another_process_trains_is_left_to_it(made, tmp_path, monkeypatch, capsys):
    """And a process that finds no free run ends well: an array may have more tasks than runs."""
    out = tmp_path / "study"
    folder = StudyFolder(out).run("baseline", 0)
    monkeypatch.setattr(runs, "PATIENCE_S", 0.3)
    command = words(made, out, "--epochs", "1", "--arms", "baseline")
    with held_elsewhere(folder):
        call(entry.main, *command)
        said = capsys.readouterr().out
        assert "left to other processes: baseline, seed 0. The last of them writes the whole table." in said
        assert not StudyFolder(out).table.exists()
        call(entry.main, *command, "distilled")
        said = capsys.readouterr().out
        assert "left to other processes: baseline, seed 0." in said and "top-1, %" not in said
        assert read_state(StudyFolder(out).run("distilled", 0))["status"] == "finished" and read_state(folder) is None
        assert "| baseline | " in StudyFolder(out).table.read_text()
    call(entry.main, *command)
    assert read_state(folder)["status"] == "finished" and "top-1, %" in capsys.readouterr().out


def test_a_run_that_becomes_free_is_taken(made, tmp_path, monkeypatch):
    """A task that was killed leaves its run to the tasks that still work."""
    out = tmp_path / "study"
    held = held_elsewhere(StudyFolder(out).run("baseline", 0))
    original = distill.run

    def run(settings, *arguments, **more):
        held.__exit__(None, None, None) if "distilled" in settings.out else None
        return original(settings, *arguments, **more)

    monkeypatch.setattr(distill, "run", run)
    held.__enter__()
    call(entry.main, *words(made, out, "--epochs", "1", "--arms", "baseline", "distilled"))
    states = [read_state(StudyFolder(out).run(name, 0))["status"] for name in ("baseline", "distilled")]
    assert states == ["finished", "finished"]


def test_a_run_that_fails_costs_no_other_and_is_tried_once(made, tmp_path, monkeypatch):
    out, original, tried = tmp_path / "study", distill.loss_of, []

    def failing(settings, classes):
        tried.append(settings.out)
        if settings.distillation.temperature == 8:
            raise UserError("the loss is not finite; lower --lr.")
        return original(settings, classes)

    monkeypatch.setattr(distill, "loss_of", failing)
    command = words(made, out, "--epochs", "1", "--arms", "hot=distilled,temperature=8", "distilled", "baseline")
    sentence = refused(entry.main, *command)
    assert sentence.startswith("1 of 3 runs failed (hot, seed 0: the loss is not finite; lower --lr); the same comm")
    states = [read_state(StudyFolder(out).run(name, 0))["status"] for name in ("baseline", "distilled", "hot")]
    assert states == ["finished", "finished", "failed"] and len(tried) == 3
    assert "Incomplete, so not tested: hot." in StudyFolder(out).table.read_text()
    monkeypatch.setattr(distill, "loss_of", original)
    call(entry.main, *command)
    assert read_state(StudyFolder(out).run("hot", 0))["status"] == "finished"


def test_fresh_crops_unlike_the_caches_are_refused(made, tmp_path):
    """baseline would differ from distilled in its crops too."""
    command = words(made, tmp_path / "study", "--crop-scale", "0.5", "1", "--arms")
    sentence = refused(entry.main, *command, "distilled", "baseline")
    assert "have area fractions of 0.35 1, but fresh crops would have 0.5 1: use --crop-scale 0.35 1" in sentence
    assert not (tmp_path / "study").exists()
    call(entry.main, *command, "baseline-cached", "--epochs", "1")


def test_an_arm_that_cannot_run_is_refused_before_others_are_trained(made, tmp_path):
    command = words(made, tmp_path / "study", "--arms", "distilled", "few=baseline,label_fraction=0.1")
    sentence = refused(entry.main, *command)
    assert "--batch-size 12 is larger than the 3 training images that are left with --label-fraction 0.1" in sentence
    assert not (tmp_path / "study").exists()


def test_baselines_on_few_labels_keep_the_shares_of_a_schedule():
    study = SETTINGS.changed(epochs=3, warmup_epochs=2.9, no_mix_epochs=1)
    for share, epochs, plain in ((1.0, 3, 1), (0.9, 3, 1), (0.1, 30, 10)):
        own = run_settings(study.changed(label_fraction=share), ARMS["baseline"], 0)
        assert (own["epochs"], own["no_mix_epochs"], own["warmup_epochs"]) == (
            epochs,
            plain,
            pytest.approx(2.9 * epochs / 3),
        )


def test_an_interrupted_study_goes_on_to_the_same_weights(made, whole, tmp_path, monkeypatch):
    """Stopped in the second run's second epoch: the first is kept, the second goes on, the third begins."""
    out, chosen = tmp_path / "study", ["baseline", "distilled", "no-gradient"]
    command = words(made, out, "--cutmix", "0.5", "--arms", *chosen)
    original = distill.loss_of
    calls = []

    def stopping(settings, classes):
        terms = original(settings, classes)

        def looked(model, batch):
            calls.append(settings.out)
            if len(calls) == 7:  # four steps a run
                os.kill(os.getpid(), signal.SIGTERM)
            return terms(model, batch)

        return looked

    monkeypatch.setattr(distill, "loss_of", stopping)
    with pytest.raises(Interrupted) as caught:
        call(entry.main, *command)
    assert caught.value.exit_code == 128 + signal.SIGTERM
    states = [read_state(StudyFolder(out).run(name, 0)) for name in chosen]
    assert [state and state["status"] for state in states] == ["finished", "interrupted", None]
    assert states[1]["step"] == 3 and not StudyFolder(out).table.exists()
    call(entry.main, *command)
    assert len(calls) == 8  # no-gradient has a loss of its own
    for name in chosen:
        ours, theirs = (load_model(StudyFolder(path).run(name, 0).model)["weights"] for path in (out, whole[0]))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert StudyFolder(out).table.exists()


def test_a_signal_between_two_runs_ends_the_study(made, tmp_path, monkeypatch):
    original = distill.run

    def run(*arguments, **more):
        folder = original(*arguments, **more)
        os.kill(os.getpid(), signal.SIGUSR2)
        return folder

    monkeypatch.setattr(distill, "run", run)
    with pytest.raises(Interrupted, match="SIGUSR2"):
        call(entry.main, *words(made, tmp_path / "study", "--arms", "baseline-cached", "distilled", "--epochs", "1"))
    assert read_state(RunFolder(tmp_path / "study/baseline-cached/seed-0"))["status"] == "finished"
    assert not (tmp_path / "study/distilled").exists()


def two_ranks(made: Path, out: Path, *more) -> subprocess.CompletedProcess:
    """A study under torchrun with two CPU ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    command = [*launcher, "kd_dist.study", *map(str, words(made, out, *more))]
    how = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "cwd": Path(__file__).parent.parent, "text": True}
    return subprocess.run(command, capture_output=True, timeout=240, **how)


def test_two_ranks_do_a_study_together(made, tmp_path):
    out = tmp_path / "study"
    done = two_ranks(made, out, "--arms", "baseline", "smooth", "--epochs", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks (cpu" in done.stdout and done.stdout.count("smooth  ") == 1
    assert [read_state(StudyFolder(out).run(name, 0))["status"] for name in ("baseline", "smooth")] == ["finished"] * 2


def test_two_ranks_side_by_side_train_what_one_process_does(made, whole, tmp_path):
    """Each run is of one rank alone, so its weights are those of a study in one process, bit for bit."""
    out, chosen = tmp_path / "study", ["baseline", "class-mean", "distilled"]
    done = two_ranks(made, out, "--cutmix", "0.5", "--side-by-side", "yes", "--arms", *chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "side by side: each of 2 ranks trains separate students" in done.stdout
    assert {line[:8] for line in done.stdout.splitlines() if ": train" in line or "1 rank (cpu" in line} == {
        *("rank 0 |", "rank 1 |")
    }
    assert done.stdout.count("what it isolates") == 1 and "| class-mean | " in StudyFolder(out).table.read_text()
    for name in chosen:
        ours, theirs = (load_model(StudyFolder(path).run(name, 0).model)["weights"] for path in (out, whole[0]))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.slow
def test_ranks_side_by_side_survive_a_failed_run_and_a_defect_of_one(made, tmp_path):
    """sitecustomize breaks two runs: one in a sentence, one in a traceback. The others are trained."""
    out, broken = tmp_path / "study", tmp_path / "broken"
    broken.mkdir()
    shutil.copy(Path(__file__).parent / "programs" / "broken_losses.py", broken / "sitecustomize.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(broken))
        chosen = ["baseline", "baseline-cached", "distilled", "hot=distilled,temperature=8", "odd=distilled,alpha=0.25"]
        done = two_ranks(made, out, "--epochs", "1", "--side-by-side", "yes", "--arms", *chosen)
    states = {name: read_state(StudyFolder(out).run(name.partition("=")[0], 0))["status"] for name in chosen}
    assert list(states.values()) == ["finished", "finished", "finished", "failed", "failed"], done.stdout + done.stderr
    assert done.returncode != 0 and "ZeroDivisionError" in done.stderr
    assert (
        "2 of 5 runs failed (hot, seed 0: the loss is not finite; odd, seed 0: ZeroDivisionError: division by zero)"
        in done.stderr
    )
    assert "| distilled | " in StudyFolder(out).table.read_text()


def test_a_rank_that_is_killed_costs_no_run_of_another(made, whole, tmp_path):
    """Its peer is stopped and saves; the same command trains what is left, to the bits of an undisturbed study."""
    out, killer = tmp_path / "study", tmp_path / "killer"
    killer.mkdir()
    shutil.copy(Path(__file__).parent / "programs" / "broken_losses.py", killer / "sitecustomize.py")
    command = ["--cutmix", "0.5", "--side-by-side", "yes", "--arms", "baseline", "gone=distilled,alpha=0.125"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(killer))
        done = two_ranks(made, out, *command)
    states = [read_state(StudyFolder(out).run(name, 0)) for name in ("baseline", "gone")]
    assert done.returncode != 0 and [state["status"] for state in states] == ["interrupted", "running"], done.stderr
    call(entry.main, *words(made, out, *command))
    ours, theirs = (load_model(StudyFolder(path).run("baseline", 0).model)["weights"] for path in (out, whole[0]))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert read_state(StudyFolder(out).run("gone", 0))["status"] == "finished"


@pytest.mark.parametrize(
    ("how", "left", "device", "ranks", "expected"),
    [
        ("auto", 8, "cuda", 8, True),
        ("auto", 7, "cuda", 8, False),
        ("no", 8, "cuda", 8, False),
        ("auto", 8, "cpu", 2, False),
        ("yes", 1, "cpu", 2, True),
        ("yes", 8, "cuda", 1, False),
    ],
)
def test_side_by_side_is_chosen_on_gpus_with_runs_for_all(rank_of, how, left, device, ranks, expected):
    runtime = replace(rank_of(0, ranks), device=torch.device(device))
    assert runs.is_side_by_side(how, left, runtime) is expected


# ---- variants: built-in arms with other settings, or another cache


@pytest.fixture(scope="module")
def other_cache(made) -> Path:
    """The same teacher's rows of three views alone, drawn otherwise."""
    path = made / "other.h5"
    call(
        cache_commands.main,
        *("write", "--data", made / "data", "--teacher", made / "teacher" / "model.pt"),
        *("--views", "3", "--seed", "9", "--device", "cpu", "-o", path),
    )
    return path


def test_a_variant_differs_in_what_it_names_and_in_nothing_else(made, other_cache, tmp_path, monkeypatch):
    out, looker = tmp_path / "study", Looker(monkeypatch)
    chosen = [
        *(
            "distilled",
            "hot=distilled,temperature=8",
            "steep=baseline-cached,lr=0.05",
            f"other=distilled,cache={other_cache}",
        ),
        *("baseline-cached", "two=distilled,views=2", "smoothed=baseline-cached,label-smoothing=0.1"),
    ]
    command = words(made, out, "--epochs", "1", "--primary", "distilled", "baseline-cached", "--arms", *chosen)
    call(entry.main, *command)
    names = ["baseline-cached", "distilled", "hot", "steep", "other", "two", "smoothed"]
    assert list(looker.runs) == names

    stored = {name: read_settings(StudyFolder(out).run(name, 0))[1] for name in names}
    differing = {
        name: {key for key in stored[name] | stored[base] if stored[name].get(key) != stored[base].get(key)}
        for name, base in (
            ("hot", "distilled"),
            ("two", "distilled"),
            ("other", "distilled"),
            ("steep", "baseline-cached"),
        )
    }
    always = {"out", "study arm", "base arm"}
    assert differing["hot"] - always == {"temperature"} and stored["hot"]["temperature"] == 8
    assert differing["two"] - always == {"views"}
    assert differing["steep"] - always == {"lr"}
    assert differing["other"] - always == {"cache", "cache digest"}
    assert stored["smoothed"]["label_smoothing"] == 0.1
    soft = 2
    assert looker.same("hot", "distilled", soft) and not looker.same("other", "distilled", soft)
    read = open_cache(other_cache).split("train").logits_NVK
    shown = torch.cat([step[soft] for step in looker.runs["other"]["steps"]]).numpy()
    assert {row.tobytes() for row in shown} <= {row.tobytes() for row in read[:, 1:].reshape(-1, 3)}

    study = json.loads((out / "study.json").read_text())
    assert study["arms"] == names
    assert study["variants"]["hot"] == "distilled,temperature=8.0"
    table = StudyFolder(out).table.read_text()
    assert [line.split(" | ")[0].strip("| ") for line in table.splitlines()[2:9]] == names
    assert "| distilled with temperature 8.0 |" in table and "with cache " in table
    assert "Agreement of other is with the teacher of its own cache." in table
    twins = re.search(r"- (\S+) is the best baseline by mean top-1 \(the others: (.*)\)\. Choosing", table)
    others = {"baseline-cached", "steep", "smoothed"} - {twins[1]}
    assert set(twins[2].split(", ")) == {"baseline (not in this study)", *others}

    looker.runs.clear()
    call(entry.main, *command)
    assert looker.runs == {}
    sentence = refused(entry.main, *command[: -len(chosen)], "hot=distilled,alpha=0.5")
    assert f"arm hot of {out} was distilled,temperature=8.0, now distilled,alpha=0.5" in sentence


def test_list_shows_the_built_in_arms(capsys):
    call(entry.main, "--list")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(ARMS)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("hot=distilled", "--arms hot=distilled changes nothing; define a variant as NAME=ARM,setting=value"),
        ("hot=cached-9,lr=1", "cached-9 is not a built-in arm; vary one of baseline, "),
        ("table.md=distilled,lr=1", "table.md cannot be the name of a new arm"),
        ("hot=distilled,lr=1,lr=2", "sets lr twice; leave one of them out"),
        ("none=distilled,alpha=0", "vary baseline or baseline-cached for an arm without soft labels"),
        ("none=smooth,alpha=0", "for an arm without soft labels"),
        ("first=no-gradient,loss=ce", "loss has no effect on no-gradient"),
        ("other=baseline,cache=x.h5", "cache has no effect on baseline"),
        ("mse=distilled,loss=mse,temperature=8", "temperature has no effect on distilled"),
        ("distilled=distilled,lr=1", "distilled cannot be the name of a new arm"),
        ("../x=distilled,lr=1", "../x cannot be the name of a new arm"),
        ("=distilled,lr=1", "nothing cannot be the name of a new arm"),
        ("long=distilled,epochs=3", "epochs=3 is not a setting of a variant; it may set cache, views, alpha,"),
        ("hot=distilled,temperature", "temperature is not a setting of a variant"),
        ("hot=distilled,temperature=warm", "argument --temperature: invalid float value: 'warm'"),
        ("hot=distilled,temperature=0", "--arms hot=distilled,temperature=0.0: --temperature 0.0 must be ab"),
        ("soft=baseline,alpha=0.5", "baseline is defined by its alpha"),
        ("warm=baseline-cached,temperature=2", "temperature has no effect on baseline-cached"),
        ("few=baseline,views=2", "views has no effect on baseline"),
        ("cut=distilled,cutmix=0.5", "cutmix has no effect on distilled"),
        ("far=distilled,cache=nowhere.h5", "there is no cache"),
        ("few=one-view,views=1", "arm few needs 2 views"),
        ("odd=distilled,loss=l1", "--arms odd=distilled,loss=l1: --loss l1 is not known"),
    ],
)
def test_a_variant_that_makes_no_sense_is_refused(made, tmp_path, word, sentence):
    assert sentence in refused(entry.main, *words(made, tmp_path / "study", "--arms", word))


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        (["--arms", "cached-2"], "arm cached-2 is not known; choose from baseline, baseline-cached, smooth"),
        (["--arms", "online"], "arm online needs the teacher: pass its weights, --teacher-model"),
        (["--arms", "hot=distilled,lr=1", "very=hot,alpha=1"], "hot is not a built-in arm; vary one of"),
        (["--arms", "same=distilled,temperature=4", "--temperature", "4"], "the study's distilled has these values"),
        (["--arms", "hot=distilled,lr=1", "hot=distilled,lr=2"], "arm hot is defined twice; give one"),
        (["--arms", "hot=distilled,lr=1", "--primary", "hot", "baseline"], "--primary hot is not a built-in arm"),
        (["--primary", "distilled"], "--primary: expected 2 arguments"),
        (["--primary", "distilled", "distilled"], "--primary distilled distilled must be two different arms"),
        (["--primary", "distilled", "soft"], "--primary soft is not a built-in arm; choose two of baseline, "),
        (["--alpha", "0"], "--alpha 0.0 must be above 0: the study already has arms without soft labels"),
        (["--seeds", "0", "-1"], "--seed -1 must be at least 0"),
        (["--seed", "1"], "unrecognized arguments: --seed 1"),
        (["--crops", "fresh"], "unrecognized arguments: --crops fresh"),
        (["--student", "vgg"], "--student vgg is not known"),
        (["--cache", "nowhere.h5"], "there is no cache nowhere.h5"),
        (["--views", "9"], "--views 9, but"),
        (
            ["--views", "2"],
            "arm shuffled-view needs 3 views of every image, one of them for evaluation, and 2 are used",
        ),
        (["--arms", "one-view", "--views", "1"], "arm one-view needs 2 views"),
        (["--teacher-model", "DATA/teacher/logits.h5", "--arms", "online"], "it is an HDF5 file, such as a cache"),
    ],
)
def test_wrong_input_is_refused_in_one_sentence(made, tmp_path, typed, sentence):
    typed = [word.replace("DATA", str(made)) for word in typed]
    assert sentence in refused(entry.main, *words(made, tmp_path / "study", *typed))


@pytest.mark.parametrize("word", ["table", "compare"])
def test_results_of_a_folder_without_a_study_are_refused(tmp_path, word):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    rest = [tmp_path / "empty"] if word == "compare" else []
    for name in ("nowhere", "empty", "file"):
        assert str(tmp_path / name) in refused(entry.main, word, tmp_path / name, *rest)
    assert not list((tmp_path / "empty").iterdir())
    assert f"`python -m kd_dist.study {word} --help` lists the options." in refused(entry.main, word)


@pytest.mark.parametrize(
    ("word", "said"), [("table", "--over SETTING"), ("compare", "McNemar"), ("--list", "built-in")]
)
def test_each_command_has_help(capsys, word, said):
    with pytest.raises(SystemExit) as ended:
        call(entry.main, word, "--help")
    assert ended.value.code == 0 and said in capsys.readouterr().out


# ---- grids


def cells(*typed, **more) -> dict[str, str]:
    """The arms of a grid by name, with their definitions ("" for a built-in arm)."""
    asked = config.resolve(StudyConfig, {"grid": typed, **more}, has_gpu=False)
    return {arm.name: arm.definition if arm.base else "" for arm in choice.chosen_arms(asked)}


def test_a_grid_is_an_arm_for_each_combination():
    """At alpha 0 there is no soft loss, so no temperature: one baseline. The study's own values are its own arm."""
    assert cells("alpha=0,0.5,0.9", "temperature=2,4") == {
        "baseline": "",
        "distilled": "",
        "alpha-0.5_temperature-2.0": "distilled,alpha=0.5,temperature=2.0",
        "alpha-0.5_temperature-4.0": "distilled,alpha=0.5,temperature=4.0",
        "alpha-0.9_temperature-2.0": "distilled,alpha=0.9,temperature=2.0",
    }
    assert cells("alpha=0,1", "lr=0.05,0.5") == {  # 0.05 is the preset's
        "baseline": "",
        "alpha-1.0_lr-0.05": "distilled,alpha=1.0,lr=0.05",
        "baseline_lr-0.5": "baseline,lr=0.5",
        "alpha-1.0_lr-0.5": "distilled,alpha=1.0,lr=0.5",
    }
    assert cells("loss=kl,mse", "temperature=2,8").keys() == {
        *("temperature-2.0_loss-kl", "temperature-8.0_loss-kl", "loss-mse"),
    }
    assert cells("alpha=0.5", arms=("shuffled-view",)) == {"shuffled-view_alpha-0.5": "shuffled-view,alpha=0.5"}
    assert list(cells("cache=a/x.h5,b/x.h5"))[1:] == ["cache-b-x.h5"]


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        (["alpha"], "--grid alpha: write it as SETTING=VALUE,VALUE."),
        (["epochs=3,4"], "--grid epochs=3,4: epochs=3 is not a setting of a variant; it may set cache, views, alpha,"),
        (["alpha=0.5", "alpha=0.9"], "names a setting twice"),
        (["cutmix=0,0.5"], "--grid: cutmix has no effect on distilled"),
        (["alpha=0.5", "--arms", "baseline"], "--grid: baseline is defined by its alpha"),
        (["alpha=0.5", "--arms", "hot=distilled,lr=1"], "arm hot=distilled,lr=1 is not known"),
        (["alpha=0.5,1.5"], "--alpha 1.5 must lie in [0, 1]"),
        (["alpha=hot"], "argument --alpha: invalid float value: 'hot'"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(made, tmp_path, typed, sentence):
    assert sentence in refused(entry.main, *words(made, tmp_path / "study", "--grid", *typed))


def test_a_grid_is_trained_and_shown_over_its_settings(made, tmp_path):
    out = tmp_path / "study"
    call(entry.main, *words(made, out, "--epochs", "1", "--grid", "alpha=0,0.5,0.9"))
    study = json.loads((out / "study.json").read_text())
    assert (study["arms"], study["grid"]) == (["baseline", "distilled", "alpha-0.5"], ["alpha"])
    table = StudyFolder(out).table.read_text()
    assert "| distilled with alpha 0.5 |" in table and "| distilled | 0.5 | alpha-0.5 | 1 |" in table
    assert StudyFolder(out).plot_over("alpha").exists() and "minus baseline" in table


def test_another_teacher_than_the_caches_is_refused(made, tmp_path):
    payload = load_model(made / "teacher" / "model.pt")
    payload["weights"]["fc.bias"] += 1
    path = tmp_path / "other.pt"
    save_model(path, payload)
    sentence = refused(entry.main, *words(made, tmp_path / "study", "--teacher-model", path, "--arms", "online"))
    assert "but" in sentence and "was labelled by" in sentence
    assert not (tmp_path / "study").exists()


def test_what_is_no_study_is_left_alone(made, tmp_path):
    (tmp_path / "study").mkdir()
    (tmp_path / "study/study.json").write_text("{}")
    assert "is not a study of this version" in refused(entry.main, *words(made, tmp_path / "study"))
    assert (tmp_path / "study/study.json").read_text() == "{}"
