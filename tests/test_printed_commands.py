"""Every command that a job prints runs as printed: in the folder where the job ran, with paths that need quotes, with
what was typed for the data repeated; and a new run starts from an earlier one's weights.
"""

import re
import shlex
from pathlib import Path

import pytest
import torch

from kd_dist import distill, report, teacher
from kd_dist.cache import __main__ as cache_entry
from kd_dist.cache import open_cache
from kd_dist.data.generated import generate
from kd_dist.models import STUDENTS, TEACHERS, Cnn5
from kd_dist.run.checkpoint import load_model, save_model, weights_digest
from kd_dist.run.claim import read_settings
from kd_dist.run.folder import RunFolder
from kd_dist.run.metrics import read_metrics
from tests.entries import call, refused

ENTRIES = {
    "kd_dist.teacher": teacher,
    "kd_dist.distill": distill,
    "kd_dist.cache": cache_entry,
    "kd_dist.report": report,
}
FOLD = ["--folds", 4, "--fold", 1, "--tune"]


def small(classes: int) -> Cnn5:
    return Cnn5(classes, channels=(4, 8, 8))


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    monkeypatch.setitem(TEACHERS, "resnet18", small)
    monkeypatch.setitem(STUDENTS, "cnn5", small)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder whose name needs quotes: 48 train and 16 val images, and a teacher with three views, trained there."""
    folder = tmp_path_factory.mktemp("printed") / "it's a place"
    generate(folder / "my data", train_per_class=12, val_per_class=4, classes=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TEACHERS, "resnet18", small)
        patch.chdir(folder)
        call(teacher.main, *typed("my runs/teacher"))
    return folder


@pytest.fixture(autouse=True)
def there(place, monkeypatch):
    monkeypatch.chdir(place)


def typed(out: str) -> list[object]:
    return [
        "--data",
        "my data",
        "--out",
        out,
        "--preset",
        "demo",
        "--views",
        3,
        "--epochs",
        1,
        "--device",
        "cpu",
        *FOLD,
    ]


def run(printed: str) -> list[str]:
    """Run a printed command in this process; gives its words."""
    words = shlex.split(printed)
    assert words[:2] == ["python", "-m"]
    main = ENTRIES[words[2]].main
    if words[2] in ("kd_dist.cache", "kd_dist.report"):
        assert main(words[3:]) in (None, 0)
    else:
        call(main, *words[3:])
    return words


def test_what_follows_the_teacher_and_the_student(capsys, place):
    call(teacher.main, *typed("my runs/second"))
    printed = re.search(r"Next: (.*)", capsys.readouterr().out)[1]
    words = run(printed)
    assert words[3:5] == ["--cache", "my runs/second/logits.h5"]
    student = RunFolder(Path("runs/student"))
    stored = read_settings(student)[1]
    kept = {name: stored[name] for name in ("data", "preset", "folds", "fold", "tune", "device")}
    assert kept == {"data": "my data", "preset": "demo", "folds": 4, "fold": 1, "tune": True, "device": "cpu"}
    run(re.search(r"compare runs by (.*)", capsys.readouterr().out)[1])
    assert "student" in capsys.readouterr().out
    call(teacher.main, *typed("my runs/second"))
    run(re.search(r"is there already; `(.*)`", capsys.readouterr().out)[1])


def test_a_teacher_without_a_cache_says_where_its_weights_are(capsys, place):
    asked = typed("my runs/no cache")
    asked[asked.index("--views") + 1] = 0
    call(teacher.main, *asked)
    printed = capsys.readouterr().out
    assert "finished: my runs/no cache/model.pt" in printed
    run(re.search(r"compare runs by (.*)", printed)[1])


def test_more_views_than_there_are(capsys, place):
    cache = "my runs/teacher/logits.h5"
    asked = ["--data", "my data", "--cache", cache, "--device", "cpu", *FOLD]
    longer = refused(distill.main, *asked, "--views", 5, "--out", "runs/five")
    words = run(re.search(r"`(.*)`", longer)[1])
    run(re.search(r"`(.*)` describes it", capsys.readouterr().out)[1])
    assert open_cache(Path(words[words.index("--output") + 1])).views == 5
    again = typed("my runs/teacher")
    again[again.index("--views") + 1] = 4
    run(re.search(r"`(.*)`", refused(teacher.main, *again))[1])
    assert open_cache(Path("my runs/teacher/logits-4-views.h5")).views == 4


# ---- known at the start


def test_a_missing_cache_is_written_by_the_command_that_is_named(capsys, place):
    asked = ["--data", "my data", "--preset", "demo", "--device", "cpu", "--cache", "a place/none.h5"]
    run(re.search(r"`(.*)`", refused(distill.main, *asked))[1])
    assert open_cache(Path("a place/none.h5")).views > 1
    call(distill.main, *asked, "--out", "runs/from-it")


def test_what_can_be_known_is_refused_before_training(place, tmp_path):
    (tmp_path / "file").touch()
    asked = [*typed(str(tmp_path / "run"))]
    assert "--top-k 4 must be less than the number of classes, 4" in refused(teacher.main, *asked, "--top-k", 4)
    sentence = refused(teacher.main, *asked, "--cache", tmp_path / "file" / "logits.h5")
    assert f"--cache {tmp_path}/file/logits.h5 cannot be written" in sentence
    assert not (tmp_path / "run").exists()
    refused(teacher.main, *asked, "--cache", tmp_path / "made" / "no" / ".." / ".." / "file" / "logits.h5")
    assert not (tmp_path / "made").exists()


# ---- a new run from earlier weights


def test_a_new_run_starts_from_the_weights_of_another(capsys, place, tmp_path):
    first = load_model(RunFolder(Path("my runs/teacher")).model)
    for name, init in (("run", "my runs/teacher"), ("file", "my runs/teacher/model.pt")):
        slow = ["--views", 0, "--lr", 1e-9, "--weight-decay", 0, "--ema", 0]
        command = [*typed(str(tmp_path / name)), *slow, "--init", init]
        call(teacher.main, *command)
        assert f"initial weights from {init}, a new schedule" in capsys.readouterr().out
        out = RunFolder(tmp_path / name)
        stored = read_settings(out)[1]
        assert stored["initial weights"] == weights_digest(first["weights"])
        weights = load_model(out.model)["weights"]
        torch.testing.assert_close(weights["classifier.weight"], first["weights"]["classifier.weight"])
        call(teacher.main, *command)
        assert len(read_metrics(out)) == 1
    longer = refused(teacher.main, *command, "--epochs", 2)
    assert f"(there, --init {out.path} trains on from this run's weights)" in longer
    sentence = refused(teacher.main, *[word for word in command if word != init and word != "--init"])
    assert "initial weights was" in sentence


def test_a_student_starts_from_weights_that_fit(place, tmp_path):
    asked = ["--data", "my data", "--alpha", 0, "--preset", "demo", "--epochs", 1, "--device", "cpu"]
    call(distill.main, *asked, "--out", tmp_path / "student", "--init", "my runs/teacher")
    assert load_model(RunFolder(tmp_path / "student").model)["kind"] == "student"


def test_weights_that_do_not_fit_are_named(place, tmp_path):
    saved = load_model(RunFolder(Path("my runs/teacher")).model)
    weights = dict(saved["weights"])
    weights["head.weight"] = weights.pop("classifier.weight")
    weights["classifier.bias"] = torch.zeros(7)
    save_model(tmp_path / "other.pt", {**saved, "weights": weights})
    sentence = refused(teacher.main, *typed(str(tmp_path / "run")), "--init", tmp_path / "other.pt")
    assert (
        "missing classifier.weight, not known head.weight, of another shape classifier.bias (there (7,), here"
        in sentence
    )
    assert "absent" in refused(teacher.main, *typed(str(tmp_path / "run")), "--init", tmp_path / "absent")
    assert not (tmp_path / "run").exists()
