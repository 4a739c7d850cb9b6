"""A run's folder: what is whole, what is refused, and what a crash or a full disk leaves behind."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from kd_dist.errors import UserError
from kd_dist.run import checkpoint, lock
from kd_dist.run.checkpoint import (
    load_checkpoint,
    load_model,
    newest_checkpoint,
    save_checkpoint,
    save_model,
    weights_digest,
)
from kd_dist.run.claim import claim, read_settings
from kd_dist.run.folder import RunFolder
from kd_dist.run.metrics import append_metrics, read_metrics, truncate_metrics
from kd_dist.run.results import read_val_logits, write_val_logits
from kd_dist.run.state import read_state, write_state

SETTINGS = {"lr": 0.1, "crop_scale": (0.35, 1.0), "epochs": 3, "workers": 2, "release": None}
MAY_CHANGE = {"workers", "device"}


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "runs" / "student")


def begin(folder, kind="student", start_over=False, **changes):
    return claim(folder, kind, {**SETTINGS, **changes}, MAY_CHANGE, start_over)


def contents(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def run_python(code, *arguments, **options):
    """Run code in a process of its own and return its standard output; its failure is the test's."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(checkpoint.__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=600,
        **options,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def flip_byte(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)


def break_tensor(path):
    """Flip a byte in the middle of the stored weights of some_payload."""
    flip_byte(path, path.read_bytes().index(b"\xab" * 16) + 5)


def some_payload(step):
    return {"weights": torch.full((16,), 0xAB, dtype=torch.uint8), "rng": torch.get_rng_state(), "note": f"at {step}"}


# ---- names


def test_the_names_in_a_run_folder_are_the_documented_ones(tmp_path):
    folder = RunFolder(tmp_path)
    named = [folder.settings, folder.state, folder.metrics, folder.model, folder.val_logits, folder.cache, folder.costs]
    assert [path.name for path in named] == [
        "settings.json",
        "state.json",
        "metrics.jsonl",
        "model.pt",
        "val_logits.h5",
        "logits.h5",
        "costs.json",
    ]
    assert folder.checkpoint(141) == tmp_path / "checkpoints" / "step-00000141.pt"
    assert contents(tmp_path) == {}


def test_looking_at_runs_imports_no_torch():
    program = """
        import sys
        import kd_dist.run.checkpoint, kd_dist.run.claim, kd_dist.run.results

        print("torch" in sys.modules, "h5py" in sys.modules)
        """
    assert run_python(program) == "False False\n"


# ---- checkpoints


def test_a_checkpoint_comes_back_with_its_step(folder):
    save_checkpoint(folder, 7, some_payload(7))
    path, payload = newest_checkpoint(folder)
    assert path == folder.checkpoint(7)
    assert payload["step"] == 7 and payload["note"] == "at 7"
    assert torch.equal(payload["rng"], torch.get_rng_state())
    assert torch.equal(payload["weights"], some_payload(7)["weights"])


def test_the_last_two_are_kept_and_strangers_left_alone(folder):
    folder.checkpoints.mkdir(parents=True)
    (folder.checkpoints / "step-best.pt").write_text("mine")
    for step in (5, 10, 15, 100_000_000):
        save_checkpoint(folder, step, some_payload(step))
    assert sorted(contents(folder.checkpoints)) == ["step-00000015.pt", "step-100000000.pt", "step-best.pt"]
    assert newest_checkpoint(folder)[1]["step"] == 100_000_000


def test_no_checkpoint_is_none(folder):
    assert newest_checkpoint(folder) is None
    begin(folder)
    assert newest_checkpoint(folder) is None


@pytest.mark.parametrize("damage", [break_tensor, lambda path: path.write_bytes(path.read_bytes()[:-100])])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(folder, damage):
    for step in (1, 2):
        save_checkpoint(folder, step, some_payload(step))
    damage(folder.checkpoint(2))
    warnings = []
    path, payload = newest_checkpoint(folder, warnings.append)
    assert (path, payload["step"]) == (folder.checkpoint(1), 1)
    assert len(warnings) == 1 and str(folder.checkpoint(2)) in warnings[0]


def test_a_damaged_checkpoint_does_not_count_as_one_of_the_two_kept(folder):
    for step in (10, 20):
        save_checkpoint(folder, step, some_payload(step))
    break_tensor(folder.checkpoint(20))
    save_checkpoint(folder, 15, some_payload(15))
    assert folder.saved_steps() == [10, 15]


def test_all_checkpoints_damaged_is_an_error_that_names_them(folder):
    for step in (1, 2):
        save_checkpoint(folder, step, some_payload(step))
        break_tensor(folder.checkpoint(step))
    with pytest.raises(UserError, match=r"step-00000002\.pt, .*step-00000001\.pt.*--start-over"):
        newest_checkpoint(folder)


def test_every_flipped_byte_is_noticed(folder):
    path = save_checkpoint(folder, 3, {"weights": torch.arange(6.0)})
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole)
        flip_byte(path, position)
        with pytest.raises(UserError, match="step-00000003"):
            load_checkpoint(path)


def test_plain_torch_and_plain_zip_read_our_files(folder):
    path = save_checkpoint(folder, 3, {"weights": torch.arange(6.0)})
    for mapped in (False, True):
        document = torch.load(path, weights_only=True, mmap=mapped)
        assert torch.equal(document["payload"]["weights"], torch.arange(6.0)) and document["step"] == 3
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment.decode() == hashlib.sha256(path.read_bytes()[:-64]).hexdigest()


def test_a_file_cut_anywhere_is_refused(folder):
    path = save_checkpoint(folder, 3, {"weights": torch.arange(6.0)})
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="step-00000003"):
            load_checkpoint(path)


def test_kill_9_in_the_middle_of_saves_never_leaves_a_broken_newest(folder):
    """A child saves without end and is killed at a random moment, again and again; what it said it saved is there."""
    begin(folder)
    seen = run_python(
        """
        import os, random, signal, sys, time, torch
        from pathlib import Path
        from kd_dist.run.checkpoint import newest_checkpoint, save_checkpoint
        from kd_dist.run.folder import RunFolder

        folder = RunFolder(Path(sys.argv[1]))

        def save_for_ever(step, report):
            while True:
                step += 1
                save_checkpoint(folder, step, {"weights": torch.full((200_000,), float(step))})
                os.write(report, b"%d\\n" % step)

        step = 0
        for _ in range(15):
            reading, writing = os.pipe()
            child = os.fork()
            if child == 0:
                save_for_ever(step, writing)
            os.close(writing)
            with os.fdopen(reading) as lines:
                first = lines.readline()
                time.sleep(random.uniform(0.0, 0.05))
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                said = [int(line) for line in [first, *lines.read().split("\\n")[:-1]]]
            path, payload = newest_checkpoint(folder)
            assert (payload["weights"] == payload["step"]).all()
            assert payload["step"] >= said[-1], "a finished save was lost"
            step = payload["step"]
        print(step)
        """,
        folder.path,
    )
    assert int(seen) >= 15
    left = [name for name in contents(folder.checkpoints) if name.endswith(".tmp")]
    assert left, "no kill hit a save: the test proves nothing"
    assert begin(folder)
    save_checkpoint(folder, int(seen) + 1, {})
    assert sorted(contents(folder.checkpoints)) == [folder.checkpoint(int(seen) + more).name for more in (0, 1)]


# ---- a full disk


def test_a_full_disk_names_the_path_and_how_to_go_on(folder):
    """A limit on file sizes plays the full disk: the write fails in the same places with EFBIG for ENOSPC."""
    begin(folder)
    said = run_python(
        """
        import resource, sys, torch, numpy as np
        from pathlib import Path
        from kd_dist.run.checkpoint import save_checkpoint, save_model
        from kd_dist.run.claim import claim
        from kd_dist.run.folder import RunFolder
        from kd_dist.run.metrics import append_metrics
        from kd_dist.run.results import write_val_logits
        from kd_dist.run.state import write_state
        from kd_dist.errors import UserError

        folder = RunFolder(Path(sys.argv[1]))
        big = {"weights": torch.ones(100_000)}
        attempts = [
            lambda: save_checkpoint(folder, 2, big),
            lambda: save_model(folder.model, big),
            lambda: write_val_logits(folder.val_logits, np.ones((9000, 10)), np.ones(9000), ["a"] * 9000, "f"),
            lambda: write_state(folder, "running", message="x" * 20_000),
            lambda: append_metrics(folder, {"step": 2, "note": "x" * 20_000}),
            lambda: claim(folder, "teacher-of-long-name", {}, set(), False),
        ]

        def attempt(number):
            try:
                attempts[number]()
            except UserError as error:
                print(error)

        def limit(size):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

        limit(10_000)
        attempt(0)
        limit(resource.RLIM_INFINITY)
        save_checkpoint(folder, 1, {"weights": torch.ones(10)})
        write_state(folder, "running", step=1)
        append_metrics(folder, {"step": 1})
        limit(10_000)
        for number in range(5):
            attempt(number)
        limit(0)
        try:
            claim(RunFolder(folder.path / ".." / "other"), "student", {}, set(), False)
        except UserError as error:
            print(error)
        """,
        folder.path,
    ).splitlines()
    paths = [folder.checkpoint(2), folder.checkpoint(2), folder.model, folder.val_logits, folder.state, folder.metrics]
    assert len(said) == 7, said
    for line, path in zip(said[:6], paths, strict=True):
        assert str(path) in line and "no space left" in line and "same command again" in line, line
    assert "no checkpoint yet" in said[0]
    assert f"it resumes from {folder.checkpoint(1)}" in said[1]
    assert "other" in said[6] and "settings.json" in said[6] and "no space left" in said[6]
    assert [name for name in contents(folder.path) if name.endswith(".tmp")] == []
    assert newest_checkpoint(folder)[1]["step"] == 1
    assert read_state(folder)["step"] == 1
    truncate_metrics(folder, 1)
    assert read_metrics(folder) == [{"step": 1}]


# ---- weights


def test_the_model_comes_back(folder):
    begin(folder)
    save_model(folder.model, {"weights": {"a": torch.ones(2)}, "arch": "cnn5"})
    assert load_model(folder.model)["arch"] == "cnn5"


def test_models_that_are_none_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"there is no .*model\.pt"):
        load_model(folder.model)
    save_checkpoint(folder, 1, some_payload(1))
    with pytest.raises(UserError, match=r"kd_dist\.model"):
        load_model(folder.checkpoint(1))
    with pytest.raises(UserError, match="cannot be read"):
        load_model(tmp_path)


FOREIGN = {
    "a PyTorch state dict": lambda path: torch.save(torch.nn.Linear(2, 2).state_dict(), path),
    "a PyTorch checkpoint": lambda path: torch.save({"epoch": 3, "state_dict": {"w": torch.ones(2)}}, path),
    "a whole pickled network": lambda path: torch.save(torch.nn.Linear(2, 2), path),
    "a TorchScript module": lambda path: torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path),
    "a pickle of another program": lambda path: torch.save({"w": 1}, path, _use_new_zipfile_serialization=False),
    "a safetensors file": lambda path: path.write_bytes((16).to_bytes(8, "little") + b'{"w":{"shape":[]}'),
    "an HDF5 file": lambda path: h5py.File(path, "w").close(),
    "an empty file": lambda path: path.write_bytes(b""),
    "a file of another kind": lambda path: path.write_text("short"),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_weights_of_another_program_are_not_called_damaged(tmp_path, kind):
    path = tmp_path / "model.pt"
    FOREIGN[kind](path)
    with pytest.raises(
        UserError, match=f"was not written by kd_dist: it is {kind}.*pass the model.pt of a run"
    ) as caught:
        load_model(path)
    assert "damaged" not in str(caught.value) and "\n" not in str(caught.value)
    assert f"--teacher NAME --weights {path}" in str(caught.value)


def test_a_model_of_ours_that_is_cut_short_is_called_damaged(folder):
    begin(folder)
    save_model(folder.model, {"weights": {"a": torch.ones(2000)}, "arch": "cnn5"})
    for length in (-1, -3000):
        folder.model.write_bytes(folder.model.read_bytes()[:length])
        with pytest.raises(UserError, match=r"model\.pt is truncated or damaged"):
            load_model(folder.model)


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_a_pickle_is_refused_and_not_run(folder):
    begin(folder)
    target = folder.path / "ran"
    save_model(folder.model, {"weights": Bomb(target)})
    with pytest.raises(UserError, match=r"model\.pt holds more than weights"):
        load_model(folder.model)
    assert not target.exists()
    torch.load(folder.model, weights_only=False)
    assert target.exists(), "the pickle is harmless: the test proves nothing"


def test_the_digest_of_weights_is_the_documented_one():
    values = np.arange(6, dtype="<f4").reshape(2, 3)
    weights = {"b": torch.from_numpy(values), "a.count": torch.tensor(5), "c": torch.ones(2, dtype=torch.bfloat16)}
    expected = hashlib.sha256()
    for parts, data in [
        (("a.count", "int64", ""), (5).to_bytes(8, "little")),
        (("b", "float32", "2,3"), values.tobytes()),
        (("c", "bfloat16", "2"), b"\x80\x3f" * 2),
    ]:
        for text in parts:
            expected.update(len(text).to_bytes(8, "little") + text.encode())
        expected.update(data)
    assert weights_digest(weights) == expected.hexdigest()
    assert weights_digest({**weights, "b": torch.from_numpy(values.T.copy()).T}) == expected.hexdigest()


def test_the_digest_sees_every_change():
    tensor = torch.arange(6.0)
    others = [
        {"a": tensor},
        {"b": tensor},
        {"a": tensor.reshape(2, 3)},
        {"a": tensor.view(torch.int32)},
        {"a": tensor, "b": torch.empty(0, 3)},
        {"a": torch.nextafter(tensor, torch.tensor(9.0))},
        {"a": tensor[:3], "b": tensor[3:]},
    ]
    assert len({weights_digest(other) for other in others}) == len(others)


# ---- settings


def test_a_fresh_run_is_written_down_and_the_same_command_resumes(folder):
    assert begin(folder) is False
    assert read_settings(folder) == ("student", json.loads(json.dumps(SETTINGS)))
    assert begin(folder) is True


def test_a_resume_may_change_what_may_change(folder):
    begin(folder)
    assert begin(folder, workers=8, device="cpu") is True
    assert read_settings(folder)[1]["workers"] == 8


def test_other_settings_are_refused_with_both_values(folder):
    begin(folder)
    before = contents(folder.path)
    with pytest.raises(UserError) as refusal:
        begin(folder, lr=0.2, crop_scale=(0.5, 1.0), workers=9, alpha=0.9)
    message = str(refusal.value)
    assert "--lr was 0.1, now 0.2" in message
    assert "--crop-scale was [0.35, 1.0], now [0.5, 1.0]" in message
    assert "--alpha was absent, now 0.9" in message
    assert "only --device, --workers" in message and "--start-over" in message and "another --out" in message
    assert "now 9" not in message and "--epochs" not in message
    assert contents(folder.path) == before


def fill(folder):
    """Every file that a run can make."""
    save_checkpoint(folder, 1, some_payload(1))
    save_model(folder.model, {})
    save_model(folder.model_after(20), {})
    write_state(folder, "finished")
    append_metrics(folder, {"step": 1})
    write_val_logits(folder.val_logits, np.ones((1, 2)), np.ones(1), ["a"], "f")
    parts = folder.path / "logits.h5.shards"
    parts.mkdir()
    for path in (folder.cache, folder.path / "logits.h5.sha256", parts / "0", folder.path / "events.out.tfevents.1.h"):
        path.write_text("x")


def test_start_over_removes_the_run_and_nothing_else(folder):
    begin(folder)
    fill(folder)
    (folder.path / "notes.txt").write_text("mine")
    (folder.checkpoints / "step-best.pt").write_text("mine")
    (folder.path / "model-epoch-best.pt").write_text("mine")
    assert begin(folder, lr=0.5, start_over=True) is False
    mine = {"notes.txt", "checkpoints/step-best.pt", "model-epoch-best.pt"}
    assert set(contents(folder.path)) == {"settings.json", ".lock", *mine}
    assert read_settings(folder)[1]["lr"] == 0.5
    assert newest_checkpoint(folder) is None and not (folder.path / "logits.h5.shards").exists()


def test_a_resume_removes_nothing_but_what_killed_writers_left(folder):
    begin(folder)
    fill(folder)
    before = contents(folder.path)
    for name in (".state.json.77.tmp", ".model.pt.77.tmp", "checkpoints/.step-00000002.pt.77.tmp"):
        (folder.path / name).write_text("half")
    assert begin(folder)
    assert contents(folder.path) == before


@pytest.mark.parametrize("start_over", [False, True])
def test_another_kind_of_run_is_refused(folder, start_over):
    begin(folder, kind="teacher")
    fill(folder)
    before = contents(folder.path)
    with pytest.raises(UserError, match="holds a teacher run, not a student run"):
        begin(folder, start_over=start_over)
    assert contents(folder.path) == before


@pytest.mark.parametrize("start_over", [False, True])
@pytest.mark.parametrize("name", ["thesis.txt", "model.pt", "settings.json"])
def test_a_strangers_folder_is_refused_and_left_alone(folder, name, start_over):
    folder.path.mkdir(parents=True)
    (folder.path / name).write_text('{"theme": "dark"}')
    with pytest.raises(UserError, match=str(folder.path)):
        begin(folder, start_over=start_over)
    assert contents(folder.path) == {name: b'{"theme": "dark"}'}


def test_hidden_files_are_no_strangers(folder):
    folder.path.mkdir(parents=True)
    (folder.path / ".nfs0001").write_text("")
    assert begin(folder) is False


def test_a_start_that_was_killed_at_once_can_be_repeated(folder):
    folder.path.mkdir(parents=True)
    folder.lock.touch()
    (folder.path / ".settings.json.77.tmp").write_text("half")
    assert begin(folder) is False
    assert set(contents(folder.path)) == {".lock", "settings.json"}


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "taken").write_text("x")
    for path in (tmp_path / "taken", tmp_path / "taken" / "student"):
        with pytest.raises(UserError, match=f"--out {path}"):
            begin(RunFolder(path))


@pytest.mark.parametrize("resumed", [False, True])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path, resumed):
    """In a process of its own that gives up root's rights, under which every folder can be written."""
    if resumed:
        begin(RunFolder(tmp_path / "locked"))
    (tmp_path / "locked").mkdir(exist_ok=True)
    (tmp_path / "locked").chmod(0o555)
    tmp_path.chmod(0o755)
    said = run_python(
        f"""
        import os
        from pathlib import Path
        from kd_dist.run.claim import claim
        from kd_dist.run.folder import RunFolder
        from kd_dist.errors import UserError

        if os.getuid() == 0:
            os.setuid(65534)
        try:
            claim(RunFolder(Path("locked" if {resumed} else "locked/run")), "student", {SETTINGS}, set(), False)
        except UserError as error:
            print(error)
        """,
        cwd=tmp_path,
    )
    assert "--out locked" in said and "cannot be written (Permission denied)" in said


HOLD = (Path(__file__).parent / "programs/hold_folder.py").read_text()


def test_a_folder_in_use_is_refused_until_its_process_ends(folder, monkeypatch):
    monkeypatch.setattr(lock, "_LOCK_PATIENCE_S", 0.0)
    root = str(Path(checkpoint.__file__).parents[2])
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder.path)], env={**os.environ, "PYTHONPATH": root}, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"mine\n"
        with pytest.raises(UserError, match=r"in use by process \d+ on .* \(python -c"):
            claim(folder, "student", {}, set(), False)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    assert claim(folder, "student", {}, set(), False) is True


# ---- state and metrics


def test_the_state_says_who_when_and_how(folder):
    assert read_state(folder) is None
    begin(folder)
    write_state(folder, "running", step=3, epoch=1)
    write_state(folder, "failed", step=4, message="loss is not finite")
    state = read_state(folder)
    assert {key: state[key] for key in ("status", "step", "message")} == {
        "status": "failed",
        "step": 4,
        "message": "loss is not finite",
    }
    assert "epoch" not in state and state["pid"] == os.getpid() and state["host"] and state["time"].endswith("+00:00")
    with pytest.raises(ValueError, match="done"):
        write_state(folder, "done")
    folder.state.write_text("{")
    with pytest.raises(UserError, match=r"state\.json"):
        read_state(folder)


def test_a_resumed_run_has_every_epoch_once(folder):
    begin(folder)
    assert read_metrics(folder) == []
    truncate_metrics(folder, 0)
    for step in (10, 20, 30):
        append_metrics(folder, {"step": step, "try": 1})
    with open(folder.metrics, "a") as file:
        file.write('{"step": 40, "tr')
    assert [row["step"] for row in read_metrics(folder)] == [10, 20, 30]
    truncate_metrics(folder, 20)
    for step in (30, 40):
        append_metrics(folder, {"step": step, "try": 2})
    assert [(row["step"], row["try"]) for row in read_metrics(folder)] == [(10, 1), (20, 1), (30, 2), (40, 2)]


def test_damaged_metrics_are_named(folder):
    begin(folder)
    folder.metrics.write_bytes(b'{"step": 1}\n\xff\xfe\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged"):
        read_metrics(folder)


# ---- val logits


def test_val_logits_come_back_and_plain_h5py_reads_them(folder):
    begin(folder)
    logits_NK = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    paths = ["val/a/1.JPEG", "val/ä/2.JPEG", "val/c", "val/d", "val/e"]
    write_val_logits(folder.val_logits, logits_NK, np.arange(5), paths, "f00d", top1=0.6)
    read = read_val_logits(folder.val_logits)
    assert np.array_equal(read.logits_NK, logits_NK) and read.labels_N.tolist() == [0, 1, 2, 3, 4]
    assert read.paths == tuple(paths) and read.fingerprint == "f00d" and read.attrs["top1"] == 0.6
    with h5py.File(folder.val_logits) as file:
        assert file["logits"].dtype == np.float32 and file["label"].dtype == np.int64
        assert file["path"].dtype.kind == "S" and file.attrs["fingerprint"] == "f00d"


def test_val_logits_that_are_none_are_refused(folder):
    begin(folder)
    with pytest.raises(UserError, match="there is no"):
        read_val_logits(folder.val_logits)
    with h5py.File(folder.val_logits, "w") as file:
        file.attrs.update({"format": "another", "version": 1, "fingerprint": "f"})
        file["logits"] = file["label"] = np.ones(3)
        file["path"] = [b"a"]
    with pytest.raises(UserError, match="not written by this program"):
        read_val_logits(folder.val_logits)
    write_val_logits(folder.val_logits, np.full((50, 3), 7.5), np.ones(50), ["a"] * 50, "f")
    whole = folder.val_logits.read_bytes()
    folder.val_logits.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="truncated"):
        read_val_logits(folder.val_logits)
    folder.val_logits.write_bytes(whole)
    flip_byte(folder.val_logits, whole.index(np.full(9, 7.5, "<f4").tobytes()) + 3)
    with pytest.raises(UserError, match="damaged"):
        read_val_logits(folder.val_logits)
