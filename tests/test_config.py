"""Settings: a flag for each, the order in which a value is found, and one sentence for each value that cannot be."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import kd_dist
from kd_dist import config, job
from kd_dist.config import (
    PRESETS,
    DistillConfig,
    Preset,
    StudentConfig,
    StudyConfig,
    TeacherConfig,
    carried,
    command,
    flags_of,
    parser_for,
    read_command_line,
    resolve,
)
from kd_dist.errors import UserError
from kd_dist.run.claim import claim
from kd_dist.run.folder import RunFolder

KINDS = (TeacherConfig, DistillConfig)
BOTH = {
    *(
        "--data",
        "--release",
        "--archive",
        "--sha256",
        "--out",
        "--cache",
        "--views",
        "--preset",
        "--workers",
        "--device",
    ),
    *("--image-size", "--epochs", "--batch-size", "--lr", "--weight-decay", "--warmup-epochs", "--seed"),
    *("--crop-scale", "--mixup", "--cutmix", "--label-smoothing", "--ema"),
}
OWN = {TeacherConfig: {"--teacher"}, DistillConfig: {"--student", "--alpha", "--temperature", "--loss", "--crops"}}


def parser(kind: type[config.JobConfig]):
    return parser_for(kind, f"kd_dist.{kind.kind}", "What it does.", "An example.")


def read(kind: type[config.JobConfig], *words: str, has_gpu: bool = False, ranks: int = 1) -> config.JobConfig:
    """The settings of a command line."""
    return resolve(kind, read_command_line(parser(kind), words), has_gpu, ranks)


# --------------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_has_a_flag_and_a_help_text(kind):
    actions = {action.option_strings[0]: action for action in parser(kind)._actions}
    names = {"--" + field.name.replace("_", "-") for field in flags_of(kind).values()}
    assert names == actions.keys() - {"-h"}
    for name in names:
        assert len(actions[name].help) > 8, name
        assert name in parser(kind).format_help()


@pytest.mark.parametrize("kind", KINDS)
def test_help_shows_the_defaults_of_every_preset(kind):
    """Those are what a run without flags uses."""
    page = " ".join(parser(kind).format_help().split())
    for name, preset in PRESETS.items():
        assert f"{name}: {preset.of(kind)['epochs']}" in page


def test_help_shows_what_a_preset_sets_where_others_have_no_default():
    assert "does not hold one yet [imagewoof2-160]. [demo: demo]" in " ".join(
        parser(TeacherConfig).format_help().split()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_flags_stand_on_the_jobs_they_belong_to(kind):
    flags = {"--" + field.name.replace("_", "-") for field in flags_of(kind).values()}
    other = next(k for k in KINDS if k is not kind)
    assert BOTH | OWN[kind] <= flags
    assert not flags & OWN[other]


def test_values_are_read_in_their_types():
    words = "--epochs 7 --lr 1e-2 --crop-scale 0.2 0.9 --workers 3 --views 5 --alpha 0.5 --start-over --data some/where"
    settings = read(DistillConfig, *words.split())
    assert (
        settings["epochs"],
        settings["lr"],
        settings["crop_scale"],
        settings["workers"],
    ) == (7, 0.01, (0.2, 0.9), 3)
    assert (settings["views"], settings["alpha"], settings["start_over"], settings.data.data) == (
        5,
        0.5,
        True,
        "some/where",
    )
    assert type(settings["epochs"]) is int and type(settings["alpha"]) is float
    assert (read(DistillConfig)["workers"], read(DistillConfig)["start_over"]) == (None, False)


def test_settings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        read(TeacherConfig).optimisation.lr = 1.0


# ------------------------------------------------------------------------------------------- where a value comes from


@pytest.fixture
def preset(monkeypatch) -> None:
    """A preset "test" that sets lr and epochs of both jobs."""
    values = {"lr": 0.31, "epochs": 33}
    monkeypatch.setitem(PRESETS, "test", Preset("for tests", values, {**values, "temperature": 7.0}))


@pytest.mark.parametrize("kind", KINDS)
def test_typed_value_before_presets_before_default(kind, preset):
    settings = read(kind, "--preset", "test", "--lr", "0.2")
    default = {field.name: field.default for field in flags_of(kind).values()}
    assert settings["lr"] == 0.2
    assert settings["epochs"] == 33 != default["epochs"]
    assert settings["weight_decay"] == default["weight_decay"]
    assert settings.preset == "test"


def test_typed_default_still_beats_the_preset(preset):
    default = {field.name: field.default for field in flags_of(DistillConfig).values()}
    assert read(DistillConfig, "--preset", "test", "--temperature", str(default["temperature"]))["temperature"] == 4.0
    assert read(DistillConfig, "--preset", "test")["temperature"] == 7.0


@pytest.mark.parametrize(
    ("words", "has_gpu", "name"),
    [
        ((), False, "cpu-64px"),
        ((), True, "gpu-128px"),
        (("--device", "cpu"), True, "cpu-64px"),
        (("--preset", "demo"), True, "demo"),
    ],
)
def test_preset_follows_the_machine_unless_named(words, has_gpu, name):
    settings = read(TeacherConfig, *words, has_gpu=has_gpu)
    assert settings.preset == name
    assert settings["image_size"] == PRESETS[name].teacher["image_size"]


def test_a_short_run_has_fewer_plain_epochs_unless_they_are_typed():
    assert (
        read(TeacherConfig, "--preset", "gpu-128px")["no_mix_epochs"]
        == PRESETS["gpu-128px"].teacher["no_mix_epochs"]
        == 25
    )
    assert [read(TeacherConfig, "--preset", "gpu-128px", "--epochs", n)["no_mix_epochs"] for n in ("40", "5")] == [4, 0]
    assert (
        read(TeacherConfig, "--preset", "gpu-128px", "--epochs", "40", "--no-mix-epochs", "40")["no_mix_epochs"] == 40
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(kind, name):
    settings = read(kind, "--preset", name)
    values = PRESETS[name].of(kind)
    assert {key: settings[key] for key in values} == values
    assert PRESETS[name].about


# ----------------------------------------------------------------------------------------------- batch and rate per GPU


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("words", "ranks", "batch_size", "lr"),
    [
        ("", 1, 512, 0.2),
        ("", 8, 4096, 1.6),
        ("--batch-size 1024", 8, 1024, 0.4),  # as typed over all GPUs; the rate follows it
        ("--batch-size 1024 --lr 0.3", 8, 1024, 0.3),
        ("--lr 0.3", 8, 4096, 0.3),
        ("--device cpu --preset gpu-128px", 8, 512, 0.2),  # on CPUs the number of ranks changes no result
    ],
)
def test_the_gpu_preset_is_for_each_gpu(kind, words, ranks, batch_size, lr):
    settings = read(kind, *words.split(), has_gpu=True, ranks=ranks)
    assert (settings.preset, settings["batch_size"], settings["lr"]) == (
        "gpu-128px",
        batch_size,
        pytest.approx(lr),
    )


def test_a_gpu_has_512_images_or_more():
    presets = [preset for preset in PRESETS.values() if preset.per_gpu]
    assert presets and all(preset.of(kind)["batch_size"] >= 512 for preset in presets for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["cpu-64px", "demo"])
@pytest.mark.parametrize("words", ["", "--batch-size 96"])
def test_presets_for_cpus_are_the_same_at_any_number_of_ranks(kind, name, words):
    one, eight = (read(kind, "--preset", name, *words.split(), has_gpu=True, ranks=ranks) for ranks in (1, 8))
    assert one == eight and one["lr"] == PRESETS[name].of(kind)["lr"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            "--preset gpu-128px --batch-size 1024",
            "the preset's 0.2 for 512 images, scaled linearly with the batch size",
        ),
        ("--preset gpu-128px --batch-size 1024 --lr 0.2", ""),
        ("--preset cpu-64px", ""),
        ("--preset cpu-64px --batch-size 128", "the preset's for batch size 64; --batch-size 128 does not change it"),
        ("--preset cpu-64px --batch-size 128 --lr 0.1", ""),
    ],
)
def test_a_rate_that_was_not_typed_is_explained(words, says):
    assert config.origin_of_lr(read(DistillConfig, *words.split(), has_gpu=True)) == says


def test_a_resume_on_fewer_gpus_keeps_the_batch(monkeypatch, tmp_path):
    """Else it would be refused: --batch-size was 4096, now 1024."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)

    def started(ranks: int, *words: str) -> TeacherConfig:
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        monkeypatch.setattr(sys, "argv", ["teacher", "--out", str(tmp_path / "run"), *words])
        return job.read_config(TeacherConfig, "kd_dist.teacher", "", "")

    def claimed(settings: TeacherConfig) -> bool:
        folder = RunFolder(tmp_path / "run")
        return claim(folder, "teacher", settings.stored(), settings.may_change, settings["start_over"])

    first = started(8)
    assert not claimed(first) and (first["batch_size"], first["lr"]) == (4096, 1.6)
    again = started(2)
    assert again == first and claimed(again)
    assert started(2, "--batch-size", "1024")["batch_size"] == 1024
    assert started(2, "--start-over")["batch_size"] == 1024


def test_batch_warnings():
    assert job.batch_warnings(256, 2, "cuda") == job.batch_warnings(8, 8, "cpu") == []
    (few,) = job.batch_warnings(256, 8, "cuda")
    assert "32 images a rank" in few and "--batch-size" in few
    (many,) = job.batch_warnings(16384, 32, "cuda")
    assert "8192" in many and "--lr" in many


# ----------------------------------------------------------------------------------------------- what follows from what


@pytest.mark.parametrize(
    ("words", "crops", "cache"),
    [
        ("", "cached", "runs/teacher/logits.h5"),
        ("--cache a.h5", "cached", "a.h5"),
        ("--alpha 0", "fresh", None),
        ("--alpha 0 --crops cached", "cached", "runs/teacher/logits.h5"),
        ("--alpha 0 --cache a.h5", "fresh", "a.h5"),  # for the agreement on val
        ("--alpha 0 --mixup 0.2 --cutmix 0.5", "fresh", None),
    ],
)
def test_crops_and_cache_follow_from_alpha(words, crops, cache):
    settings = read(DistillConfig, *words.split())
    assert (settings.crops, settings["cache"]) == (crops, cache)
    assert settings.uses_fresh_crops == (crops == "fresh")
    assert settings.resolved() == settings


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "words", ["", "--seed 3 --crop-scale 0.1 0.7 --workers 2", "--start-over --preset demo --views 3"]
)
def test_stored_settings_are_plain_and_whole(kind, words):
    settings = read(kind, *words.split())
    stored = settings.stored()
    assert json.loads(json.dumps(stored)) == stored
    assert stored.keys() == {field.name for field in flags_of(kind).values()}
    assert (
        kind.of(**{name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()})
        == settings
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_resume_may_change_are_settings(kind):
    names = {field.name for field in flags_of(kind).values()}
    assert kind.may_change <= names
    decisive = {"lr", "epochs", "batch_size", "seed", "image_size", "crop_scale", "ema", "alpha", "temperature", "loss"}
    assert not kind.may_change & decisive


# ------------------------------------------------------------------------------------------------------------- composed


@pytest.mark.parametrize("kind", [*KINDS, StudentConfig, StudyConfig])
def test_a_flag_is_in_one_group(kind):
    groups = [dataclasses.fields(group) for group in config.jobs.groups_of(kind).values()]
    names = [field.name for group in groups for field in group]
    assert len(names) == len({*names}) and {*names} <= flags_of(kind).keys()


def test_values_by_flag_name_and_back():
    made = DistillConfig.of(alpha=0.5, epochs=7, seed=3, data="images")
    assert (made["alpha"], made["epochs"], made.seed, made.data.data) == (0.5, 7, 3, "images")
    assert DistillConfig.of(**made.flat()) == made
    changed = made.changed(epochs=9, crops="cached")
    assert (changed.optimisation.epochs, changed.crops, changed.distillation.alpha) == (9, "cached", 0.5)
    with pytest.raises(TypeError, match="learning_rate"):
        made.changed(learning_rate=1.0)
    with pytest.raises(UserError, match="--epochs 0"):
        made.changed(epochs=0)


def test_a_study_has_neither_seed_nor_crops_of_its_own():
    assert not {"seed", "crops"} & flags_of(StudyConfig).keys()
    with pytest.raises(UserError, match="--seed"):
        read(StudyConfig, "--seed", "3")


def test_only_the_distill_job_needs_a_row_for_every_crop():
    """A student with its teacher at hand does not, and a study's arms have crops of their own."""
    fresh = {"alpha": 0.5, "crops": "fresh", "mixup": 0.5}
    assert StudentConfig.of(**fresh).uses_fresh_crops and StudyConfig.of(alpha=0.5, mixup=0.5)
    with pytest.raises(UserError, match="needs --crops cached"):
        DistillConfig.of(**fresh)


# ----------------------------------------------------------------------------------------------------- printed commands


def test_a_printed_command_gives_the_values_back():
    values = {"data": "my data", "crop_scale": (0.2, 0.9), "tune": True, "folds": 4, "fold": 0, "sha256": None}
    line = command("kd_dist.distill", **values, start_over=False)
    assert line == "python -m kd_dist.distill --data 'my data' --crop-scale 0.2 0.9 --tune --folds 4 --fold 0"
    typed = read_command_line(parser(DistillConfig), shlex.split(line)[3:])
    values.pop("sha256")
    assert typed == {**values, "crop_scale": [0.2, 0.9]}


def test_what_a_next_command_repeats():
    made = read(TeacherConfig, "--preset", "demo", "--data", "a b", "--folds", "4", "--fold", "0", "--epochs", "3")
    assert carried(made) == {"data": "a b", "folds": 4, "fold": 0, "preset": "demo"}
    assert carried(made, config.OF_DATA) == {"data": "a b"}


# ---------------------------------------------------------------------------------------------------------- bad values

BAD_ON_BOTH = [
    "--epochs 0",
    "--epochs -3",
    "--epochs 1.5",
    "--epochs many",
    "--batch-size 0",
    "--batch-size -64",
    "--image-size 0",
    "--image-size nan",
    "--lr 0",
    "--lr -0.1",
    "--lr nan",
    "--lr inf",
    "--weight-decay -1",
    "--weight-decay nan",
    "--warmup-epochs -1",
    "--warmup-epochs nan",
    "--warmup-epochs 5 --epochs 5",
    "--label-smoothing 1",
    "--label-smoothing -0.1",
    "--label-smoothing nan",
    "--ema 1",
    "--ema nan",
    "--mixup 1.5",
    "--mixup nan",
    "--cutmix -0.5",
    "--cutmix nan",
    "--no-mix-epochs -1",
    "--no-mix-epochs 101",
    "--crop-scale 0 1",
    "--crop-scale 0.8 0.2",
    "--crop-scale 0.5 1.5",
    "--crop-scale nan 1",
    "--crop-scale 0.5 nan",
    "--crop-scale 0.5",
    "--seed -1",
    "--seed 18446744073709551616",  # torch takes 64 bits
    "--workers -1",
    "--views -2",
    "--device tpu",
    "--preset huge",
    "--checkpoint-minutes 0",
    "--checkpoint-minutes nan",
    "--learning-rate 0.1",
    "--epoch 5",  # an abbreviation
]
BAD_ON_TEACHER = ["--mixup 0.6 --cutmix 0.6", "--alpha 0.5", "--temperature 2"]
BAD_ON_STUDENT = [
    "--views 0",
    "--alpha -0.1",
    "--alpha 1.1",
    "--alpha nan",
    "--alpha much",
    "--temperature 0",
    "--temperature -4",
    "--temperature nan",
    "--temperature inf",
    "--crops live",
    "--alpha 0.5 --crops fresh",
    "--cutmix 0.5",  # cached crops cannot be mixed
    "--mixup 0.5",
    "--mixup 0.6 --cutmix 0.6 --alpha 0",
    "--teacher resnet18",
]


@pytest.mark.parametrize(
    ("kind", "words"),
    [(kind, words) for kind in KINDS for words in BAD_ON_BOTH]
    + [(TeacherConfig, words) for words in BAD_ON_TEACHER]
    + [(DistillConfig, words) for words in BAD_ON_STUDENT],
)
def test_bad_value_is_refused_in_one_sentence_that_names_its_flag(kind, words):
    with pytest.raises(UserError) as caught:
        read(kind, *words.split())
    sentence = str(caught.value)
    assert words.split()[0] in sentence
    assert "\n" not in sentence
    assert sentence.endswith(".")


@pytest.mark.parametrize(
    ("words", "known"),
    [
        ("--preset huge", tuple(PRESETS)),
        ("--device tpu", ("cpu", "cuda", "auto")),
        ("--crops live", ("cached", "fresh")),
    ],
)
def test_unknown_name_is_answered_by_the_known_ones(words, known):
    with pytest.raises(UserError) as caught:
        read(DistillConfig, *words.split())
    assert all(name in str(caught.value) for name in known)


def test_sentence_shows_the_value_that_was_typed():
    """Not the sum of two flags as the value of one of them."""
    with pytest.raises(UserError, match=r"--cutmix 0\.5\b"):
        read(DistillConfig, "--cutmix", "0.5")


def test_errors_name_a_command_that_can_be_typed():
    with pytest.raises(UserError, match=r"`python -m kd_dist\.distill --help`"):
        read_command_line(parser_for(DistillConfig, "kd_dist.distill", "", ""), ["--wrong"])


def test_settings_are_read_without_torch():
    """A login node reads them fast: nothing but Python's own library is imported."""
    code = "import sys, kd_dist.config; print(sorted({'torch', 'numpy', 'h5py', 'PIL'} & sys.modules.keys()))"
    environment = {**os.environ, "PYTHONPATH": str(Path(kd_dist.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("[]\n", "")
