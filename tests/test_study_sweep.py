"""The sweep: which arms make a line, where each run stands on the axis, and what is refused."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from kd_dist.errors import UserError
from kd_dist.study import __main__ as entry
from kd_dist.study import sweep as module
from kd_dist.study.results import write
from kd_dist.study.sweep import sweep
from tests.entries import call, refused
from tests.test_cache_format import write_cache
from tests.test_study_results import N, describe, make_run, rows_of

PNG = b"\x89PNG\r\n"


@pytest.fixture
def study(tmp_path):
    """cached-V on a cache of five views and on two of them, with two seeds; its hard twin on all labels and a tenth."""
    write_cache(tmp_path / "five.h5", views=5)
    return make_study(tmp_path / "study", tmp_path / "five.h5")


def make_study(out, cache, epochs=3):
    wrong = {"cached-V": (4, 6), "few": (10, 12), "hot": (5, 5), "hard-fresh": (12, 16), "tenth": (30, 20)}
    own = {"few": {"views": 2}, "hot": {"temperature": 8.0}, "tenth": {"labelled": 0.1}}
    for arm, wrong_S in wrong.items():
        for seed, count in enumerate(wrong_S):
            make_run(out, arm, seed, count, **{"cache": str(cache), **own.get(arm, {})})
    variants = {"few": "cached-V,views=2", "hot": "cached-V,temperature=8.0", "tenth": "hard-fresh,labelled=0.1"}
    describe(out, arms=[*wrong], variants=variants, cache=str(cache), settings={"epochs": epochs})
    return out


def cell(*wrong_S):
    top1_S = 100 - 100 * np.array(wrong_S) / N
    return f"{top1_S.mean():.2f} ± {top1_S.std(ddof=1):.2f} ({len(top1_S)})"


def test_arms_that_differ_in_the_setting_alone_make_a_line(study):
    shown = rows_of(sweep("views", [study]))
    head = shown.pop("views of an image in the cache, the evaluation view counted")
    assert head[1:] == ["cached-V: top-1, % (seeds)"]
    assert shown["2"] == ["2", cell(10, 12)] and shown["5"] == ["5", cell(4, 6)]
    assert {*shown} == {"2", "5"}
    assert (study / "sweep-views.png").read_bytes().startswith(PNG)


def test_a_setting_that_a_run_does_not_name_has_its_default(study):
    """Runs of the time before --labelled had all labels."""
    shown = rows_of(sweep("labelled", [study]))
    assert shown["0.1"] == ["0.1", cell(30, 20)] and shown["1"] == ["1", cell(12, 16)]
    assert shown["share of the labels that is used"][1:] == ["hard-fresh: top-1, % (seeds)"]


def test_a_cache_stands_where_its_teachers_top1_is(study, tmp_path, monkeypatch):
    other = tmp_path / "other.h5"
    for seed in range(2):
        make_run(study, "other", seed, 20 + seed, cache=str(other))
    describe(study, variants={"other": f"cached-V,cache={other}"}, settings={})
    top1 = {other: 0.61234, tmp_path / "five.h5": 0.75}
    monkeypatch.setattr(module, "open_cache", lambda path, memory: SimpleNamespace(val_top1=top1[path]))
    shown = rows_of(sweep("cache", [study]))
    assert shown["61.23"] == ["61.23", cell(20, 21)] and shown["75"] == ["75", cell(4, 6)]


def test_several_studies_have_lines_of_their_own(study, tmp_path):
    longer = make_study(tmp_path / "longer", tmp_path / "five.h5", epochs=6)
    text = sweep("temperature", [study, longer])
    (head,) = [row for name, row in rows_of(text).items() if name == "temperature"]
    assert head[1:] == [f"cached-V, {epochs} epochs: top-1, % (seeds)" for epochs in (3, 6)]
    assert str(study / "sweep-temperature.png") in text and not (longer / "sweep-temperature.png").exists()
    same = make_study(tmp_path / "same", tmp_path / "five.h5")
    assert "cached-V, same: top-1" in sweep("temperature", [study, same])


def test_unfinished_runs_are_left_out(study):
    make_run(study, "few", 2, 0, views=2, status="interrupted")
    assert rows_of(sweep("views", [study]))["2"] == ["2", cell(10, 12)]


def test_other_val_images_are_refused(study, tmp_path):
    make_run(tmp_path / "foreign", "cached-V", 0, 4, fingerprint="e" * 64, cache=str(tmp_path / "five.h5"))
    with pytest.raises(UserError, match="is of other val images"):
        sweep("views", [study, tmp_path / "foreign"])


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("epochs", "epochs cannot be swept over; name one of cache, views, alpha, temperature, labelled, "),
        ("loss", "loss cannot be swept over"),
        (
            "weight-decay",
            "has finished runs of two values of weight_decay; make variants, as in --arms cached-V other=",
        ),
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
    assert "| 5 | " + cell(4, 6) + " |" in capsys.readouterr().out
    assert "name a setting and studies' folders" in refused(entry.main, "sweep", "views")
