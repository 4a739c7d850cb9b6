"""The study: arms that differ in one thing each, run once, resumed where they stopped, refused in one sentence."""

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

from kd_dist import checkpoint, config, distill, objectives, teacher, views
from kd_dist.batches import Batch
from kd_dist.cache import __main__ as cache_commands
from kd_dist.cache import open_cache
from kd_dist.checkpoint import RunFolder, load_model, read_metrics, read_settings, read_state, save_model
from kd_dist.config import StudentConfig, StudyConfig
from kd_dist.errors import UserError
from kd_dist.generated import generate
from kd_dist.label import load_teacher
from kd_dist.losses import kl
from kd_dist.runtime import Interrupted
from kd_dist.study import __main__ as entry
from kd_dist.study import arms, online
from kd_dist.study.arms import ARMS
from kd_dist.study.folder import StudyFolder, run_settings
from kd_dist.training import Trainer
from tests.entries import call, refused
from tests.ranks import run_command

N, V, K = 12, 4, 3
TINY = ["--image-size", "32", "--batch-size", "12", "--lr", "0.02", "--device", "cpu", "--checkpoint-minutes", "1000"]
SETTINGS = StudyConfig.of(epochs=2, warmup_epochs=0.5, temperature=3.0, cutmix=0.5).resolved()
ROWS = StudentConfig.of(temperature=3.0)


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


# ---- rows that take the cached ones' place


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
    made_NVK = ARMS[name].rows(logits_NVK, labels_N, ROWS.changed(seed=5))
    image_NV, view_NV = np.moveaxis(sources(made_NVK, logits_NVK), 2, 0)
    assert (view_NV == np.arange(V)).all() and (image_NV == image_NV[:, :1]).all()
    other_N = image_NV[:, 0]
    assert sorted(other_N) == list(range(N)) and (other_N != np.arange(N)).all()
    same_class_N = labels_N[other_N] == labels_N
    assert same_class_N.all() if name == "shuffled-within" else not same_class_N.all()
    assert np.array_equal(made_NVK, ARMS[name].rows(logits_NVK, labels_N, ROWS.changed(seed=5)))
    assert not np.array_equal(made_NVK, ARMS[name].rows(logits_NVK, labels_N, ROWS.changed(seed=6)))


def test_shuffled_views_are_another_drawn_view_of_the_same_image(rows):
    logits_NVK, labels_N = rows
    found_NV2 = sources(ARMS["shuffled-view"].rows(logits_NVK, labels_N, ROWS), logits_NVK)
    assert (found_NV2[..., 0] == np.arange(N)[:, None]).all()
    drawn_NV = found_NV2[:, 1:, 1]
    assert (np.sort(drawn_NV, axis=1) == np.arange(1, V)).all() and (drawn_NV != np.arange(1, V)).all()
    assert len(np.unique(drawn_NV, axis=0)) == 2  # not the same move for every image


def test_class_mean_is_the_mean_over_the_class_and_its_drawn_views(rows):
    logits_NVK, labels_N = rows
    made_NVK = ARMS["class-mean"].rows(logits_NVK, labels_N, ROWS)
    for n in range(N):
        mean_K = logits_NVK[labels_N == labels_N[n], 1:].astype(np.float64).mean(axis=(0, 1))
        np.testing.assert_allclose(made_NVK[n], np.tile(mean_K, (V, 1)), rtol=1e-6)


def test_cached_1_has_the_first_drawn_views_row_for_all(rows):
    logits_NVK, labels_N = rows
    found_NV2 = sources(ARMS["cached-1"].rows(logits_NVK, labels_N, ROWS), logits_NVK)
    assert (found_NV2[..., 0] == np.arange(N)[:, None]).all() and (found_NV2[..., 1] == 1).all()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_smooth_is_the_smoothed_label_of_the_caches_mean_entropy(rows, temperature):
    logits_NVK, labels_N = rows
    made_NVK = ARMS["smooth"].rows(logits_NVK, labels_N, ROWS.changed(temperature=temperature))
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


def test_a_class_of_one_image_has_no_other(rows):
    logits_NVK, labels_N = rows
    with pytest.raises(UserError, match="class 9 has one training image"):
        ARMS["shuffled-within"].rows(logits_NVK, np.where(np.arange(N) == 4, 9, labels_N), ROWS)


# ---- settings and losses


def test_an_arm_changes_what_it_says_and_nothing_else():
    of_arm = {name: run_settings(SETTINGS, arm, 3).stored() for name, arm in ARMS.items()}
    base = of_arm["cached-V"]
    assert (base["seed"], base["out"], base["crops"], base["cutmix"]) == (
        3,
        "runs/study/cached-V/seed-3",
        "cached",
        0.0,
    )
    differing = {
        name: {key for key in base if key != "out" and stored[key] != base[key]} for name, stored in of_arm.items()
    }
    fresh = {"crops", "cutmix"}
    assert differing.pop("hard-fresh") == {"alpha", *fresh} and differing.pop("hard-cached") == {"alpha"}
    assert differing.pop("online") == fresh  # a fair twin of hard-fresh: blended alike
    assert not any(differing.values())  # the others differ in rows or loss
    without = {name for name, arm in ARMS.items() if arm.rows is None and arm.loss is None}
    assert without == {"hard-fresh", "hard-cached", "cached-V", "online"}


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


def test_origin_learns_from_the_labels_alone(batch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, K))
    settings = run_settings(SETTINGS.changed(alpha=0.3), ARMS["origin"], 0)
    gradient, found = gradients(ARMS["origin"].loss(settings, K), model, batch)
    hard, _ = gradients(objectives.hard(K, 0.0), model, batch)
    np.testing.assert_allclose(gradient, 0.3 * hard, rtol=1e-5, atol=1e-7)
    q_BK, p_BK = (
        softmax(x.detach().double().numpy() / 3, axis=1) for x in (model(batch.images_BCHW), batch.teacher_logits_BK)
    )
    np.testing.assert_allclose(found["soft"], (q_BK * (np.log(q_BK) - p_BK)).mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(found["total"].detach(), 0.3 * found["hard"].detach() + 0.7 * found["soft"], rtol=1e-6)


@pytest.mark.parametrize("size", [32, 40])
def test_online_is_the_teachers_loss_on_the_very_pictures(made, tiny_pixels, size, batch):
    """The teacher sees 40 px: at 32 it has the blended crops rendered again, at 40 it is handed the student's."""
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
    pictures = {side: normalise(views.show(tiny_pixels["train"], shown, side)) for side in (size, 40)}
    batch = replace(batch, images_BCHW=pictures[size], shown=shown, teacher_logits_BK=None)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, K))
    gradient, found = gradients(seen(settings, K), model, batch)
    with torch.no_grad():
        teacher_BK = model_file.model(pictures[40])
    assert torch.equal(found["soft"], kl(model(pictures[size]), teacher_BK, 3.0))
    expected = objectives.distilled(K, 0.0, kl, settings.alpha, 3.0)
    assert torch.equal(gradient, gradients(expected, model, replace(batch, teacher_logits_BK=teacher_BK))[0])
    assert all(weight.grad is None for weight in model_file.model.parameters())


# ---- whole studies


class Looker:
    """Notes what every run begins with, the pictures and soft labels of its steps, and who was trained."""

    def __init__(self, monkeypatch):
        self.runs: dict[str, dict] = {}
        original = Trainer.run

        def run(trainer, stop):
            name = trainer.folder.path.parent.name
            start = torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])
            steps, terms = [], trainer.loss_terms

            def looking(model, batch):
                steps.append((batch.index_B, batch.images_BCHW, batch.teacher_logits_BK))
                return terms(model, batch)

            trainer.loss_terms = looking
            self.runs[name] = {"start": start, "steps": steps}
            original(trainer, stop)

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
    index, pictures, soft = range(3)
    for name, arm in ARMS.items():
        assert torch.equal(looker.runs[name]["start"], looker.runs["cached-V"]["start"])
        assert looker.same(name, "cached-V", index)
        twin = "hard-fresh" if arm.changes.get("crops") == "fresh" else "cached-V"
        assert looker.same(name, twin, pictures)
        read = [step[soft] for step in looker.runs[name]["steps"]]
        if name in ("hard-fresh", "hard-cached", "online"):
            assert read == [None] * 4
        else:
            assert looker.same(name, "cached-V", soft) == (name in ("cached-V", "origin"))
    assert not looker.same("hard-fresh", "cached-V", pictures)


def test_a_studys_folder_says_what_was_asked_and_each_run_its_arm(whole):
    out, _ = whole
    study = json.loads((out / "study.json").read_text())
    assert (study["arms"], study["seeds"]) == (list(ARMS), [0])
    assert study["primary"] == ["cached-V", "hard-fresh"] and study["settings"]["epochs"] == 2
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
    for name in ("hard-fresh", "cached-V"):
        shutil.copytree(whole[0] / name, out / name)
    looker = Looker(monkeypatch)
    more = ["--teacher-model", made / "teacher" / "model.pt", "--cutmix", "0.5"]
    call(entry.main, *words(made, out, *more, "--arms", "cached-V,hard-fresh"))
    assert looker.runs == {} and capsys.readouterr().out.count("finished already") == 2
    call(entry.main, *words(made, out, *more, "--arms", "cached-V", "smooth", "--seeds", "0", "4", "--epochs", "2"))
    assert list(looker.runs) == ["smooth", "cached-V"]  # smooth with both seeds, cached-V with the new one
    study = json.loads((out / "study.json").read_text())
    assert (study["arms"], study["seeds"]) == (["hard-fresh", "smooth", "cached-V"], [0, 4])
    assert "--epochs was 2, now 3" in refused(entry.main, *words(made, out, *more, "--epochs", "3"))
    primary = refused(entry.main, *words(made, out, *more, "--primary", "cached-1", "hard-fresh"))
    assert '--primary was ["cached-V", "hard-fresh"], now ["cached-1", "hard-fresh"]' in primary
    shutil.move(out / "cached-V" / "seed-4", out / "cached-1" / "seed-4")
    foreign = refused(entry.main, *words(made, out, *more, "--arms", "cached-1", "--seeds", "4"))
    assert 'study arm was "cached-V", now "cached-1"' in foreign


def test_a_study_of_an_older_version_is_gone_on_with(made, whole, tmp_path, capsys):
    """Settings that it did not have count as their defaults; the first run's lr was not the default."""
    out = tmp_path / "study"
    shutil.copytree(whole[0] / "cached-V", out / "cached-V")
    shutil.copy(whole[0] / "study.json", out)
    files = [out / "study.json", StudyFolder(out).run("cached-V", 0).settings]

    def forget(name):
        for file in files:
            document = json.loads(file.read_text())
            del document["settings"][name]
            file.write_text(json.dumps(document))

    command = words(made, out, "--cutmix", "0.5", "--arms", "cached-V")
    forget("weight_decay")
    call(entry.main, *command)
    assert "cached-V, seed 0: finished already" in capsys.readouterr().out
    forget("lr")
    assert "--lr was 0.2, now 0.02" in refused(entry.main, *command)
    files[0].unlink()
    assert "--lr was 0.2, now 0.02" in refused(entry.main, *command)


def test_each_cache_is_opened_once(made, other_cache, tmp_path, monkeypatch, capsys):
    opened = []
    for module in (distill, entry):
        original = module.open_cache
        keep = lambda path, once, original=original: opened.append(Path(path)) or original(path, once)  # noqa: E731
        monkeypatch.setattr(module, "open_cache", keep)
    command = words(made, tmp_path / "study", "--epochs", "1", "--arms", "cached-V")
    monkeypatch.chdir(made)
    command[command.index("--cache") + 1] = "teacher/logits.h5"
    call(entry.main, *command, f"other=cached-V,cache={other_cache}")
    assert sorted(path.name for path in opened) == sorted(["logits.h5", other_cache.name])
    document = json.loads((tmp_path / "study" / "study.json").read_text())
    assert document["cache"] == str(made / "teacher" / "logits.h5")


def test_start_over_with_other_settings_removes_the_earlier_runs(made, tmp_path):
    out = tmp_path / "study"
    call(entry.main, *words(made, out, "--arms", "hard-fresh", "cached-1"))
    (out / "cached-1" / "mine.txt").write_text("not a run's")
    (out / "other" / "seed-7").mkdir(parents=True)
    (out / "other" / "seed-7" / "model.pt").write_text("not a run's either")
    command = words(made, out, "--lr", "0.01", "--arms", "cached-V")
    assert "or add --start-over to remove it and its runs." in refused(entry.main, *command)
    call(entry.main, *command, "--start-over")
    assert {*StudyFolder(out).runs()} == {"cached-V", "other"} and not (out / "hard-fresh" / "seed-0").exists()
    assert (out / "cached-1" / "mine.txt").exists() and (out / "other" / "seed-7" / "model.pt").exists()
    assert "hard-fresh" not in StudyFolder(out).table.read_text().split("\n\n")[0]


def test_another_cache_is_another_study(made, other_cache, tmp_path):
    out = tmp_path / "study"
    call(entry.main, *words(made, out, "--epochs", "1", "--arms", "hard-fresh"))
    command = words(made, out, "--epochs", "1", "--arms", "cached-V")
    command[command.index("--cache") + 1] = other_cache
    sentence = refused(entry.main, *command)
    digests = [open_cache(path).digest for path in (made / "teacher" / "logits.h5", other_cache)]
    assert f'cache digest was "{digests[0]}", now "{digests[1]}"' in sentence
    moved = shutil.copy(made / "teacher" / "logits.h5", tmp_path / "moved.h5")
    command[command.index("--cache") + 1] = moved
    call(entry.main, *command)
    assert {*StudyFolder(out).runs()} == {"hard-fresh", "cached-V"}


def test_a_run_that_another_process_is_at_is_left_to_it(made, tmp_path, monkeypatch, capsys):
    out = tmp_path / "study"
    folder = StudyFolder(out).run("hard-fresh", 0)
    folder.path.mkdir(parents=True)
    hold = (
        "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX); "
        "print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(folder.lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    monkeypatch.setattr(checkpoint, "_LOCK_PATIENCE_S", 0.3)
    command = words(made, out, "--epochs", "1", "--arms", "hard-fresh")
    assert "another process is at all runs that are left in" in refused(entry.main, *command)
    call(entry.main, *command, "cached-V")
    assert "hard-fresh, seed 0: another process is at it, left to it" in capsys.readouterr().out
    assert read_state(StudyFolder(out).run("cached-V", 0))["status"] == "finished" and read_state(folder) is None
    holder.communicate()
    call(entry.main, *command)
    assert read_state(folder)["status"] == "finished"


def test_fresh_crops_unlike_the_caches_are_refused(made, tmp_path):
    """hard-fresh would differ from cached-V in its crops too."""
    command = words(made, tmp_path / "study", "--crop-scale", "0.5", "1", "--arms")
    sentence = refused(entry.main, *command, "cached-V", "hard-fresh")
    assert "have area shares of 0.35 1, fresh crops would have 0.5 1: use --crop-scale 0.35 1" in sentence
    assert not (tmp_path / "study").exists()
    call(entry.main, *command, "hard-cached", "--epochs", "1")


def test_an_arm_that_cannot_run_is_refused_before_others_are_trained(made, tmp_path):
    command = words(made, tmp_path / "study", "--arms", "cached-V", "few=hard-fresh,label_fraction=0.1")
    sentence = refused(entry.main, *command)
    assert "--batch-size 12 is larger than the 3 training images that --label-fraction 0.1 leaves" in sentence
    assert not (tmp_path / "study").exists()


def test_twins_on_few_labels_keep_the_shares_of_a_schedule():
    study = SETTINGS.changed(epochs=3, warmup_epochs=2.9, no_mix_epochs=1)
    for share, epochs, plain in ((1.0, 3, 1), (0.9, 3, 1), (0.1, 30, 10)):
        own = run_settings(study.changed(label_fraction=share), ARMS["hard-fresh"], 0)
        assert (own.epochs, own.no_mix_epochs, own.warmup_epochs) == (epochs, plain, pytest.approx(2.9 * epochs / 3))


def test_an_interrupted_study_goes_on_to_the_same_weights(made, whole, tmp_path, monkeypatch):
    """Stopped in the second run's second epoch: the first is kept, the second goes on, the third begins."""
    out, chosen = tmp_path / "study", ["hard-fresh", "cached-V", "origin"]
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
    assert len(calls) == 8  # origin has a loss of its own
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
        call(entry.main, *words(made, tmp_path / "study", "--arms", "hard-cached", "cached-V", "--epochs", "1"))
    assert read_state(RunFolder(tmp_path / "study/hard-cached/seed-0"))["status"] == "finished"
    assert not (tmp_path / "study/cached-V").exists()


def test_two_ranks_do_a_study_together(made, tmp_path):
    out = tmp_path / "study"
    arguments = words(made, out, "--arms", "hard-fresh", "smooth", "--epochs", "1")
    done = run_command("kd_dist.study", *arguments, ranks=2)
    assert "2 ranks on cpu" in done.stdout and done.stdout.count("| smooth |") == 1
    assert [read_state(StudyFolder(out).run(name, 0))["status"] for name in ("hard-fresh", "smooth")] == [
        "finished"
    ] * 2


# ---- variants: arms of the ladder with other settings, or another cache


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
        *("cached-V", "hot=cached-V,temperature=8", "steep=hard-cached,lr=0.05", f"other=cached-V,cache={other_cache}"),
        *("hard-cached", "two=cached-V,views=2", "smoothed=hard-cached,label-smoothing=0.1"),
    ]
    command = words(made, out, "--epochs", "1", "--primary", "cached-V", "hard-cached", "--arms", *chosen)
    call(entry.main, *command)
    names = ["hard-cached", "cached-V", "hot", "steep", "other", "two", "smoothed"]
    assert list(looker.runs) == names

    stored = {name: read_settings(StudyFolder(out).run(name, 0))[1] for name in names}
    differing = {
        name: {key for key in stored[name] | stored[base] if stored[name].get(key) != stored[base].get(key)}
        for name, base in (("hot", "cached-V"), ("two", "cached-V"), ("other", "cached-V"), ("steep", "hard-cached"))
    }
    always = {"out", "study arm", "made of"}
    assert differing["hot"] - always == {"temperature"} and stored["hot"]["temperature"] == 8
    assert differing["two"] - always == {"views"}
    assert differing["steep"] - always == {"lr"}
    assert differing["other"] - always == {"cache", "cache digest"}
    assert stored["smoothed"]["label_smoothing"] == 0.1
    soft = 2
    assert looker.same("hot", "cached-V", soft) and not looker.same("other", "cached-V", soft)
    read = open_cache(other_cache).split("train").logits_NVK
    shown = torch.cat([step[soft] for step in looker.runs["other"]["steps"]]).numpy()
    assert {row.tobytes() for row in shown} <= {row.tobytes() for row in read[:, 1:].reshape(-1, 3)}

    study = json.loads((out / "study.json").read_text())
    assert study["arms"] == names
    assert study["variants"]["hot"] == "cached-V,temperature=8.0"
    table = StudyFolder(out).table.read_text()
    assert [line.split(" | ")[0].strip("| ") for line in table.splitlines()[2:9]] == names
    assert "| as cached-V, with temperature 8.0 |" in table and "with cache " in table
    assert "Agreement of other is with the teacher of its own cache." in table
    twins = re.search(r"- (\S+) is the best hard twin, by mean top-1 \(besides it: (.*)\)\. Taking", table)
    others = {"hard-cached", "steep", "smoothed"} - {twins[1]}
    assert set(twins[2].split(", ")) == {"hard-fresh (not in this study)", *others}

    looker.runs.clear()
    call(entry.main, *command)
    assert looker.runs == {}
    sentence = refused(entry.main, *command[: -len(chosen)], "hot=cached-V,alpha=0.5")
    assert f"arm hot of {out} was cached-V,temperature=8.0, now cached-V,alpha=0.5" in sentence


def test_list_shows_the_ladder(capsys):
    call(entry.main, "--list")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(ARMS)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("hot=cached-V", "--arms hot=cached-V changes nothing; make one by NAME=ARM,setting=value"),
        ("hot=cached-9,lr=1", "cached-9 is no arm of the ladder; vary one of hard-fresh, "),
        ("table.md=cached-V,lr=1", "table.md cannot be the name of a new arm"),
        ("hot=cached-V,lr=1,lr=2", "sets lr twice; leave one of them out"),
        ("none=cached-V,alpha=0", "arms without soft labels are there already; vary hard-fresh or"),
        ("none=smooth,alpha=0", "arms without soft labels are there already"),
        ("first=origin,loss=ce", "loss has no effect there"),
        ("other=hard-fresh,cache=x.h5", "cache has no effect there"),
        ("mse=cached-V,loss=mse,temperature=8", "temperature has no effect there"),
        ("cached-V=cached-V,lr=1", "cached-V cannot be the name of a new arm"),
        ("../x=cached-V,lr=1", "../x cannot be the name of a new arm"),
        ("=cached-V,lr=1", "nothing cannot be the name of a new arm"),
        ("long=cached-V,epochs=3", "epochs=3 is no setting; a variant sets cache, views, alpha,"),
        ("hot=cached-V,temperature", "temperature is no setting"),
        ("hot=cached-V,temperature=warm", "argument --temperature: invalid float value: 'warm'"),
        ("hot=cached-V,temperature=0", "--arms hot=cached-V,temperature=0.0: --temperature 0.0 must be ab"),
        ("soft=hard-fresh,alpha=0.5", "alpha is what makes hard-fresh what it is"),
        ("warm=hard-cached,temperature=2", "temperature has no effect there"),
        ("few=hard-fresh,views=2", "views has no effect there"),
        ("cut=cached-V,cutmix=0.5", "cutmix has no effect there"),
        ("far=cached-V,cache=nowhere.h5", "there is no cache"),
        ("few=cached-1,views=1", "arm few needs 2 views"),
        ("odd=cached-V,loss=l1", "--arms odd=cached-V,loss=l1: --loss l1 is not known"),
    ],
)
def test_a_variant_that_makes_no_sense_is_refused(made, tmp_path, word, sentence):
    assert sentence in refused(entry.main, *words(made, tmp_path / "study", "--arms", word))


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        (["--arms", "cached-2"], "arm cached-2 is not known; choose from hard-fresh, hard-cached, smooth"),
        (["--arms", "online"], "arm online needs the teacher: name its weights, --teacher-model"),
        (["--arms", "hot=cached-V,lr=1", "very=hot,alpha=1"], "hot is no arm of the ladder; vary one of"),
        (["--arms", "same=cached-V,temperature=4", "--temperature", "4"], "the study's cached-V has these values"),
        (["--arms", "hot=cached-V,lr=1", "hot=cached-V,lr=2"], "arm hot is made twice, in two ways"),
        (["--arms", "hot=cached-V,lr=1", "--primary", "hot", "hard-fresh"], "--primary hot is no arm of the ladder"),
        (["--primary", "cached-V"], "--primary cached-V must be two different arms"),
        (["--primary", "cached-V", "cached-V"], "--primary cached-V cached-V must be two different arms"),
        (["--primary", "cached-V", "soft"], "--primary soft is no arm of the ladder; name two of hard-fresh, "),
        (["--alpha", "0"], "--alpha 0.0 must be above 0: the arms without soft labels are there already"),
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
        (["--arms", "cached-1", "--views", "1"], "arm cached-1 needs 2 views"),
        (["--teacher-model", "DATA/teacher/logits.h5", "--arms", "online"], "is cut short, damaged or no file of ours"),
    ],
)
def test_wrong_input_is_refused_in_one_sentence(made, tmp_path, typed, sentence):
    typed = [word.replace("DATA", str(made)) for word in typed]
    assert sentence in refused(entry.main, *words(made, tmp_path / "study", *typed))


@pytest.mark.parametrize("word", ["table", "sweep", "compare"])
def test_results_of_a_folder_without_a_study_are_refused(tmp_path, word):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    rest = {"table": [], "sweep": [], "compare": [tmp_path / "empty"]}[word]
    first = {"table": [], "sweep": ["views"], "compare": []}[word]
    for name in ("nowhere", "empty", "file"):
        assert str(tmp_path / name) in refused(entry.main, word, *first, tmp_path / name, *rest)
    assert not list((tmp_path / "empty").iterdir())
    assert "python -m kd_dist.study" in refused(entry.main, word, "--help")


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
    assert "is no study of ours" in refused(entry.main, *words(made, tmp_path / "study"))
    assert (tmp_path / "study/study.json").read_text() == "{}"
