"""Every wrong input ends in one sentence of ours that names what is wrong, with exit code 2, and nothing is
overwritten.

Most cases start the entry in this process, as one rank, because starting Python is the slow part; the ones about ranks
use torchrun.
"""

import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import pytest

from kd_dist import distill, models, teacher
from kd_dist.cache.__main__ import main as cache_main
from kd_dist.cache.format import checksum_file_of
from kd_dist.data.generated import generate
from kd_dist.dataset import main as dataset_main
from kd_dist.errors import UserError
from kd_dist.files import sha256_of
from kd_dist.models import STUDENTS
from kd_dist.run.folder import RunFolder
from kd_dist.run.state import read_state
from tests.entries import call, refused
from tests.ranks import free_port

REPO = Path(__file__).parent.parent
TINY = ["--image-size", "32", "--batch-size", "24", "--warmup-epochs", "0.5", "--device", "cpu", "--epochs", "1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a tiny set (data) and a teacher's run (teacher) with its cache."""
    folder = tmp_path_factory.mktemp("bad")
    generate(folder / "data", train_per_class=6, val_per_class=3, seed=0)
    call(teacher.main, "--data", folder / "data", "--out", folder / "teacher", "--views", 2, *TINY)
    return folder


@pytest.fixture
def cache(made, tmp_path) -> Path:
    """A copy of the cache, to be damaged."""
    for name in ("logits.h5", "logits.h5.sha256"):
        shutil.copy(made / "teacher" / name, tmp_path / name)
    return tmp_path / "logits.h5"


def distilling(made, tmp_path, *more):
    return ["--data", made / "data", "--out", tmp_path / "student", *TINY, *more]


# ---- what was typed

TYPED = {
    "alpha above 1": (["--alpha", "1.5"], "--alpha 1.5 must lie in"),
    "alpha below 0": (["--alpha", "-0.1"], "--alpha -0.1 must lie in"),
    "alpha not a number": (["--alpha", "nan"], "--alpha nan must lie in"),
    "temperature 0": (["--temperature", "0"], "--temperature 0.0 must be above 0"),
    "temperature negative": (["--temperature", "-2"], "--temperature -2.0 must be above 0"),
    "no views": (["--views", "0"], "--views 0 must be at least 1"),
    "seed too large": (["--seed", "9" * 30], "must be at least 0 and below 2^63"),
    "negative epochs": (["--epochs", "-3"], "--epochs -3 must be at least 1"),
    "no batch": (["--batch-size", "0"], "--batch-size 0 must be at least 1"),
    "unknown student": (["--student", "vgg"], "--student vgg is not known (did you mean torchvision:vgg"),
    "unknown loss": (["--loss", "hinge"], "choose from kl, ce, mse, std, dkd"),
    "unknown preset": (["--preset", "tpu"], "choose from gpu-128px, cpu-64px, demo"),
    "unknown crops": (["--crops", "stale"], "choose from cached, fresh"),
    "unknown flag": (["--tempature", "4"], "--tempature 4; `python -m kd_dist.distill --help` lists the flags"),
    "not a number": (["--epochs", "many"], "invalid int value: 'many'"),
    "fresh crops with soft labels": (["--crops", "fresh"], "needs --crops cached"),
    "mixup on cached crops": (["--mixup", "0.5"], "--mixup 0.5 needs --crops fresh"),
    "crop scale upside down": (["--crop-scale", "0.9", "0.2"], "--crop-scale 0.9 0.2 must be two fractions"),
}


@pytest.mark.parametrize("typed, expected", TYPED.values(), ids=TYPED.keys())
def test_wrong_settings(made, tmp_path, typed, expected):
    sentence = refused(distill.main, *distilling(made, tmp_path, "--cache", made / "teacher" / "logits.h5", *typed))
    assert expected in sentence
    assert not (tmp_path / "student").exists()


def test_unknown_teacher(made, tmp_path):
    sentence = refused(teacher.main, "--teacher", "resnet1001", "--out", tmp_path / "run")
    assert "resnet1001 is not known (did you mean " in sentence and "choose from resnet18" in sentence
    assert not (tmp_path / "run").exists()


def test_batch_larger_than_the_data(made, tmp_path):
    sentence = refused(distill.main, *distilling(made, tmp_path, "--alpha", 0, "--batch-size", 1000))
    assert "--batch-size 1000 is larger than the 60 training images" in sentence


@pytest.mark.parametrize(
    "student, size, smallest", [("cnn5", 16, 32), ("cnn5_wide", 8, 32), ("reference_cnn", 8, None)]
)
def test_image_too_small_for_the_network(made, tmp_path, student, size, smallest):
    """The smallest size that the sentence names is the smallest that works."""
    asked = distilling(made, tmp_path, "--alpha", 0, "--student", student)
    sentence = refused(distill.main, *asked, "--image-size", size)
    named = int(re.fullmatch(rf"--image-size {size} is too small .*; the smallest that works is (\d+)\.", sentence)[1])
    assert smallest in (named, None)
    model = STUDENTS[student](10)
    models.require_image_size(named, model, "cnn5")
    with pytest.raises(UserError):
        models.require_image_size(named - 1, model, "cnn5")


# ---- the cache


def test_no_cache_yet(made, tmp_path):
    sentence = refused(distill.main, *distilling(made, tmp_path, "--cache", tmp_path / "absent.h5"))
    assert "absent.h5" in sentence and "kd_dist.teacher" in sentence


def test_more_views_than_the_cache_has(made, cache, tmp_path):
    sentence = refused(distill.main, *distilling(made, tmp_path, "--cache", cache, "--views", 9))
    assert "--views 9" in sentence and "holds 2" in sentence and "extend" in sentence


def resign(cache: Path) -> None:
    """Make the digest file fit again, as a careless copy or a forger would."""
    checksum_file_of(cache).write_text(f"{sha256_of(cache)}  {cache.name}\n")


def truncate(cache):
    cache.write_bytes(cache.read_bytes()[: cache.stat().st_size // 2])


def flip_a_byte(cache):
    with h5py.File(cache) as file:
        place = file["train/logits"].id.get_offset()
    content = bytearray(cache.read_bytes())
    content[place + 3] ^= 1
    cache.write_bytes(content)


def make_foreign(cache):
    with h5py.File(cache, "w") as file:
        file["weather"] = [1, 2, 3]


def leave_half_written(cache):
    with h5py.File(cache, "r+") as file:
        file.attrs["complete"] = type(file.attrs["complete"])(False)


def write_text(cache):
    cache.write_text("<html>404</html>")


@pytest.mark.parametrize("signed", [False, True], ids=["old digest", "digest made to fit"])
@pytest.mark.parametrize("damage", [truncate, flip_a_byte, make_foreign, leave_half_written, write_text])
def test_damaged_cache(made, cache, tmp_path, damage, signed):
    damage(cache)
    if signed:
        resign(cache)
    assert "logits.h5" in refused(distill.main, *distilling(made, tmp_path, "--cache", cache))
    assert not (tmp_path / "student").exists()


def shuffle_rows(cache):
    with h5py.File(cache, "r+") as file:
        file["train/logits"][...] = file["train/logits"][...][::-1]


def test_shuffled_rows(made, cache, tmp_path):
    """With a digest file that was made to fit, and although every row alone is a good one."""
    shuffle_rows(cache)
    resign(cache)
    assert "the columns of train" in refused(distill.main, *distilling(made, tmp_path, "--cache", cache))


@pytest.mark.parametrize(
    "classes, per_class, seed, expected",
    [(9, 6, 0, "9"), (10, 7, 0, "70"), (10, 6, 5, "train/")],
    ids=["K", "N", "content"],
)
def test_cache_of_other_data(made, tmp_path, classes, per_class, seed, expected):
    generate(tmp_path / "other", train_per_class=per_class, val_per_class=3, seed=seed, classes=classes)
    arguments = distilling(made, tmp_path, "--cache", made / "teacher" / "logits.h5", "--data", tmp_path / "other")
    assert expected in refused(distill.main, *arguments)


# ---- the data


def test_no_such_folder(made, tmp_path):
    sentence = refused(distill.main, *distilling(made, tmp_path, "--alpha", 0, "--data", tmp_path / "nowhere"))
    assert "nowhere" in sentence and "--release" in sentence


def copied(made, tmp_path) -> Path:
    shutil.copytree(made / "data", tmp_path / "data", ignore=shutil.ignore_patterns(".kd_dist"))
    return tmp_path / "data"


def test_empty_class_and_class_missing_in_val(made, tmp_path):
    root = copied(made, tmp_path)
    first, second = sorted((root / "train").iterdir())[:2]
    shutil.rmtree(root / "val" / second.name)
    assert second.name in refused(distill.main, *distilling(made, tmp_path, "--alpha", 0, "--data", root))
    shutil.copytree(second, root / "val" / second.name)
    for path in first.iterdir():
        path.unlink()
    assert first.name in refused(distill.main, *distilling(made, tmp_path, "--alpha", 0, "--data", root))


def test_corrupt_image_is_named(made, tmp_path):
    root = copied(made, tmp_path)
    image = sorted((root / "train").glob("*/*"))[7]
    image.write_bytes(image.read_bytes()[:200])
    assert image.name in refused(distill.main, *distilling(made, tmp_path, "--alpha", 0, "--data", root))


def test_archive_missing_wrong_or_out_of_reach(tmp_path):
    target = ["--data", tmp_path / "set", "--release", "imagewoof2-160", "--out", tmp_path / "run"]
    assert "absent.tgz" in refused(dataset_checked, *target, "--archive", tmp_path / "absent.tgz")
    (tmp_path / "some.tgz").write_bytes(b"not the archive")
    sentence = refused(dataset_checked, *target, "--archive", tmp_path / "some.tgz", "--sha256", "0" * 64)
    assert "0" * 64 in sentence
    sentence = refused(dataset_checked, *target, "--archive", f"http://127.0.0.1:{free_port()}/some.tgz")
    assert "--archive" in sentence and "127.0.0.1" in sentence


def dataset_checked():
    """The fetch, through the job that needs it."""
    call(distill.main, *sys.argv[1:], "--alpha", 0)


# ---- the run folder


def test_folder_of_another_run_and_other_settings(made, tmp_path):
    sentence = refused(distill.main, *distilling(made, tmp_path, "--alpha", 0, "--out", made / "teacher"))
    assert "teacher run" in sentence and "--out" in sentence
    arguments = ["--data", made / "data", "--out", made / "teacher", "--views", 2, *TINY, "--lr", 0.7]
    sentence = refused(teacher.main, *arguments)
    assert "--lr was" in sentence and "now 0.7" in sentence and "--start-over" in sentence


def test_folder_of_a_stranger(made, tmp_path):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "thesis.tex").write_text("years of work")
    assert "is not empty and not a run folder (it holds thesis.tex" in refused(
        distill.main, *distilling(made, tmp_path, "--alpha", 0, "--start-over")
    )
    assert (tmp_path / "student" / "thesis.tex").read_text() == "years of work"


def test_folder_that_cannot_be_written(made, tmp_path):
    (tmp_path / "file").write_text("")
    assert "--out" in refused(distill.main, *distilling(made, tmp_path, "--alpha", 0, "--out", tmp_path / "file" / "x"))


def test_a_refused_command_does_not_bind_the_folder(made, tmp_path):
    refused(distill.main, *distilling(made, tmp_path, "--alpha", 0, "--batch-size", 1000))
    call(distill.main, *distilling(made, tmp_path, "--alpha", 0))
    assert read_state(RunFolder(tmp_path / "student"))["status"] == "finished"


def test_a_finished_run_stays_what_it_is(made, tmp_path):
    """Other data, another cache: refused, and the run's settings and state are as they were."""
    arguments = distilling(made, tmp_path, "--cache", made / "teacher" / "logits.h5")
    call(distill.main, *arguments)
    folder = RunFolder(tmp_path / "student")
    before = folder.settings.read_text(), folder.state.read_text()
    generate(tmp_path / "other", train_per_class=6, val_per_class=3, seed=5)
    assert "train/" in refused(distill.main, *arguments, "--data", tmp_path / "other")
    call(
        cache_main,
        "write",
        "--teacher",
        made / "teacher" / "model.pt",
        "--data",
        made / "data",
        "--views",
        3,
        "-o",
        tmp_path / "longer.h5",
        "--device",
        "cpu",
    )
    assert "cache digest was" in refused(distill.main, *arguments, "--cache", tmp_path / "longer.h5")
    assert (folder.settings.read_text(), folder.state.read_text()) == before


def test_a_teacher_takes_no_other_cache_for_its_own(made, tmp_path):
    cache = made / "teacher" / "logits.h5"
    other = ["--data", made / "data", "--out", tmp_path / "run", "--views", 2, *TINY, "--seed", 1]
    assert "not of this run" in refused(teacher.main, *other, "--cache", cache)
    call(teacher.main, *other)
    assert "was labelled by the teacher" in refused(teacher.main, *other, "--cache", cache)
    assert "holds 2 views, but --views is 3" in refused(teacher.main, *other, "--views", 3)
    truncate(tmp_path / "run" / "logits.h5")
    assert "logits.h5" in refused(teacher.main, *other)


# ---- machine: disk, ranks, ports


def small_files_only():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


def start(command, **more) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    return subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        **{"env": environment, "cwd": REPO, "capture_output": True, "text": True, "timeout": 240, **more},
    )


def ours(result: subprocess.CompletedProcess) -> list[str]:
    """The lines of standard error that are ours."""
    return [line for line in result.stderr.splitlines() if line.startswith("kd_dist:")]


@pytest.mark.slow
def test_full_disk_under_two_ranks_is_one_sentence(made, tmp_path):
    """A limit on file size plays the full disk: checkpoints of 12 MB do not fit."""
    ranks = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "kd_dist.distill"]
    result = start([*ranks, *distilling(made, tmp_path, "--alpha", 0)], preexec_fn=small_files_only)
    assert result.returncode != 0
    (sentence,) = ours(result)
    assert "no space left" in sentence and "step-" in sentence and "same command again" in sentence
    assert "kd_dist/training/" not in result.stderr
    assert not list((tmp_path / "student").rglob("*.tmp"))


def test_no_gpu_and_more_ranks_than_gpus(made, tmp_path, monkeypatch):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "no GPU is visible" in refused(distill.main, *distilling(made, tmp_path, "--alpha", 0, "--device", "cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    from kd_dist.dist.rendezvous import choose_device

    with pytest.raises(UserError, match="4 ranks but only 2 visible GPUs on this machine; use --nproc_per_node=2"):
        choose_device("auto", 0, 4)


def test_one_sentence_from_two_ranks_for_what_all_of_them_see(made, tmp_path):
    ranks = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "kd_dist.distill"]
    result = start([*ranks, *distilling(made, tmp_path, "--cache", tmp_path / "absent.h5")])
    assert result.returncode != 0 and len(ours(result)) == 1 and "absent.h5" in ours(result)[0]
    assert not re.search(r"File .*kd_dist/", result.stderr)


def test_port_in_use_and_nobody_at_the_master_address(made, tmp_path):
    import socket

    with contextlib.closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        environment = {**os.environ, **place, "PYTHONPATH": str(REPO)}
        result = start(["kd_dist.distill", *distilling(made, tmp_path, "--alpha", 0)], env=environment)
    assert result.returncode == 2
    (sentence,) = ours(result)
    assert "port" in sentence and place["MASTER_PORT"] in sentence and "Traceback" not in result.stderr


def test_exit_code_and_stream_of_a_refusal(tmp_path):
    result = start(["kd_dist.cache", "info", tmp_path / "absent.h5"])
    assert result.returncode == 2 and result.stdout == "" and len(result.stderr.splitlines()) == 1


def test_cache_command_lists_what_it_knows():
    assert "--help" in refused(lambda: cache_main(["frobnicate"]))
    assert dataset_main(["--list"]) in (0, None)
