"""The sweep: which arms make a line, where each run stands on the axis, and what is refused."""

import json

import numpy as np
import pytest

from kd_dist.cache import open_cache
from kd_dist.checkpoint import write_val_logits
from kd_dist.errors import UserError
from kd_dist.study import __main__ as entry
from kd_dist.study.results import write
from kd_dist.study.sweep import sweep
from tests.entries import call, refused
from tests.test_cache_format import write_cache
from tests.test_study_results import N, describe, make_run

PNG = b"\x89PNG\r\n"


@pytest.fixture
def study(tmp_path):
    """cached-V on a cache of five views and on two of them, with two seeds; its hard twin on all labels and a tenth."""
    write_cache(tmp_path / "five.h5", views=5)
    return make_study(tmp_path / "study", tmp_path / "five.h5")


def make_study(out, cache, epochs=3):
    wrong = {"cached-V": (4, 6), "few": (10, 12), "hot": (5, 5), "hard-fresh": (12, 16), "tenth": (30, 20)}
    own = {"few": {"views": 2}, "hot": {"temperature": 8.0}, "tenth": {"label_fraction": 0.1}}
    for arm, wrong_S in wrong.items():
        for seed, count in enumerate(wrong_S):
            make_run(out, arm, seed, count, **{"cache": str(cache), **own.get(arm, {})})
    variants = {"few": "cached-V,views=2", "hot": "cached-V,temperature=8.0", "tenth": "hard-fresh,label_fraction=0.1"}
    describe(out, arms=[*wrong], variants=variants, cache=str(cache), settings={"epochs": epochs})
    return out


def points(text):
    """[(line, value, arm, seeds, top-1)] of a sweep's table."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [tuple(cell.strip() for cell in line) for line in lines[2:]]


def head(text):
    return [cell.strip() for cell in text.splitlines()[0].strip("|").split("|")]


def shown(*wrong_S):
    """Seeds and top-1 as the table has them."""
    top1_S = 100 - 100 * np.array(wrong_S) / N
    return f"{len(top1_S)}", f"{top1_S.mean():.2f} ± {top1_S.std(ddof=1):.2f}"


def test_arms_that_differ_in_the_setting_alone_make_a_line(study):
    text = sweep("views", [study])
    assert head(text)[1] == "views of an image in the cache, the evaluation view counted"
    assert head(text)[4] == "top-1 on val, %"
    assert points(text) == [("cached-V", "2", "few", *shown(10, 12)), ("cached-V", "5", "cached-V", *shown(4, 6))]
    assert (study / "sweep-views.png").read_bytes().startswith(PNG)


def test_a_lost_study_file_joins_no_arms_that_differ_in_more(study):
    """hot has another temperature: it is a line with nobody, and no part of cached-V's."""
    for name, made_of in (("few", "cached-V"), ("hot", "cached-V"), ("tenth", "hard-fresh")):
        for seed in range(2):
            file = study / name / f"seed-{seed}" / "settings.json"
            document = json.loads(file.read_text())
            document["settings"]["made of"] = made_of
            file.write_text(json.dumps(document))
    whole = points(sweep("views", [study]))
    (study / "study.json").unlink()
    assert points(sweep("views", [study])) == whole


def test_a_setting_that_a_run_does_not_name_has_its_default(study):
    """Runs of the time before --label-fraction had all labels."""
    text = sweep("label_fraction", [study])
    assert head(text)[1] == "share of the labels that is used"
    assert points(text) == [
        ("hard-fresh", "0.1", "tenth", *shown(30, 20)),
        ("hard-fresh", "1", "hard-fresh", *shown(12, 16)),
    ]


@pytest.mark.parametrize("of", ["val", "part 0 of 10 of train"])
def test_a_cache_stands_where_its_own_top1_is(tmp_path, of):
    """On the images that the runs were scored on: the whole of val, or a part of train in an order of its own."""
    split, wrong = ("val", 1) if of == "val" else ("train", 2)
    caches = [write_cache(tmp_path / f"{name}.h5", views=2) for name in "ab"]
    table = open_cache(caches[0]).split(split)
    rows_M = np.arange(len(table.paths))[::-1]
    expected = 100 * float((table.logits_NVK[rows_M, 0].argmax(axis=1) == table.labels_N[rows_M]).mean())
    for arm, cache in zip(("cached-V", "other"), caches, strict=True):
        folder = make_run(tmp_path / "study", arm, 0, wrong, cache=str(cache))
        logits_MK = np.eye(3)[table.labels_N[rows_M]]
        paths = [table.paths[row] for row in rows_M]
        write_val_logits(folder.val_logits, logits_MK, table.labels_N[rows_M], paths, "f" * 64, top1=1.0, of=of)
    describe(tmp_path / "study", variants={"other": f"cached-V,cache={caches[1]}"}, settings={})
    text = sweep("cache", [tmp_path / "study"])
    assert head(text)[1] == f"top-1 of the cache's own rows on {of}, %" and head(text)[4] == f"top-1 on {of}, %"
    # two caches at one value stay two points
    assert [(value, arm) for _, value, arm, _, _ in points(text)] == [
        (f"{round(expected, 2):g}", "cached-V"),
        (f"{round(expected, 2):g}", "other"),
    ]


def test_several_studies_have_lines_of_their_own(study, tmp_path):
    longer = make_study(tmp_path / "longer", tmp_path / "five.h5", epochs=6)
    text = sweep("temperature", [study, longer])
    assert {line for line, *_ in points(text)} == {f"cached-V, {epochs} epochs" for epochs in (3, 6)}
    assert str(study / "sweep-temperature.png") in text and not (longer / "sweep-temperature.png").exists()
    same = make_study(tmp_path / "same", tmp_path / "five.h5")
    assert {line for line, *_ in points(sweep("temperature", [study, same]))} == {"cached-V, study", "cached-V, same"}
    namesake = make_study(tmp_path / "b" / "study", tmp_path / "five.h5")
    named = {line for line, *_ in points(sweep("temperature", [study, namesake]))}
    assert named == {f"cached-V, {study}", f"cached-V, {namesake}"}


def test_unfinished_runs_are_left_out(study):
    make_run(study, "few", 2, 0, views=2, status="interrupted")
    assert points(sweep("views", [study]))[0] == ("cached-V", "2", "few", *shown(10, 12))


def test_other_val_images_are_refused(study, tmp_path):
    make_run(tmp_path / "foreign", "cached-V", 0, 4, fingerprint="e" * 64, cache=str(tmp_path / "five.h5"))
    with pytest.raises(UserError, match="is of other val images"):
        sweep("views", [study, tmp_path / "foreign"])


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("epochs", "epochs cannot be swept over; name one of cache, views, alpha, temperature, label-fraction, "),
        ("loss", "loss cannot be swept over"),
        ("weight-decay", "differ in weight_decay alone and have finished runs; make variants, as in --arms cached-V "),
    ],
)
def test_what_has_no_axis_or_no_values_is_refused(study, setting, sentence):
    assert sentence in refused(entry.main, "sweep", setting, study)
    assert not [*study.glob("sweep-*")]


def test_the_figures_say_what_a_variant_is_made_of(study):
    write(study)
    figures = json.loads((study / "results.json").read_text())
    assert figures["variants"]["few"] == "cached-V,views=2" and figures["settings"] == {"epochs": 3}


def test_the_command_prints_the_table(study, capsys):
    call(entry.main, "sweep", "views", study)
    assert points(capsys.readouterr().out)[0][:3] == ("cached-V", "2", "few")
    assert "name a setting and studies' folders" in refused(entry.main, "sweep", "views")
