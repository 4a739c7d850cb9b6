"""Top-1 over a setting: which arms make a line, the value of each run, and what is refused."""

import json

import numpy as np
import pytest

from kd_dist.errors import UserError
from kd_dist.study import __main__ as entry
from kd_dist.study import table as study_table
from kd_dist.study.over import over
from tests.entries import call, refused
from tests.test_cache_format import write_cache
from tests.test_study_results import N, describe, make_run

PNG = b"\x89PNG\r\n"


@pytest.fixture
def study(tmp_path):
    """distilled on five views of a cache and on two, with two seeds; its baseline on all labels and on a tenth."""
    write_cache(tmp_path / "five.h5", views=5)
    return make_study(tmp_path / "study", tmp_path / "five.h5")


def make_study(out, cache, epochs=3):
    wrong = {"distilled": (4, 6), "few": (10, 12), "hot": (5, 5), "baseline": (12, 16), "tenth": (30, 20)}
    own = {"few": {"views": 2}, "hot": {"temperature": 8.0}, "tenth": {"label_fraction": 0.1}}
    for arm, wrong_S in wrong.items():
        for seed, count in enumerate(wrong_S):
            make_run(out, arm, seed, count, **{"cache": str(cache), **own.get(arm, {})})
    variants = {"few": "distilled,views=2", "hot": "distilled,temperature=8.0", "tenth": "baseline,label_fraction=0.1"}
    describe(out, arms=[*wrong], variants=variants, cache=str(cache), settings={"epochs": epochs})
    return out


def markdown_over(setting, outs):
    return over(setting, outs, as_markdown=True)


def points(text):
    """[(line, value, arm, seeds, top-1)] of a table over a setting."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [tuple(cell.strip() for cell in line) for line in lines[2:]]


def head(text):
    return [cell.strip() for cell in text.splitlines()[0].strip("|").split("|")]


def shown(*wrong_S):
    """Seeds and top-1 as the table has them."""
    top1_S = 100 - 100 * np.array(wrong_S) / N
    return f"{len(top1_S)}", f"{top1_S.mean():.2f} ± {top1_S.std(ddof=1):.2f}"


def test_arms_that_differ_in_the_setting_alone_make_a_line(study):
    text = markdown_over("views", [study])
    assert head(text)[1] == "views of an image in the cache, the evaluation view counted"
    assert head(text)[4] == "top-1 on val, %"
    assert points(text) == [("distilled", "2", "few", *shown(10, 12)), ("distilled", "5", "distilled", *shown(4, 6))]
    assert (study / "over-views.png").read_bytes().startswith(PNG)


def test_a_lost_study_file_joins_no_arms_that_differ_in_more(study):
    """hot has another temperature: it is a line with nobody, and no part of distilled's."""
    for name, made_of in (("few", "distilled"), ("hot", "distilled"), ("tenth", "baseline")):
        for seed in range(2):
            file = study / name / f"seed-{seed}" / "settings.json"
            document = json.loads(file.read_text())
            document["settings"]["base arm"] = made_of
            file.write_text(json.dumps(document))
    whole = points(markdown_over("views", [study]))
    (study / "study.json").unlink()
    assert points(markdown_over("views", [study])) == whole


def test_a_setting_that_a_run_does_not_name_has_its_default(study):
    """Runs of the time before --label-fraction had all labels."""
    text = markdown_over("label_fraction", [study])
    assert head(text)[1] == "fraction of the labels that is used"
    assert points(text) == [
        ("baseline", "0.1", "tenth", *shown(30, 20)),
        ("baseline", "1", "baseline", *shown(12, 16)),
    ]


def test_several_studies_have_lines_of_their_own(study, tmp_path):
    longer = make_study(tmp_path / "longer", tmp_path / "five.h5", epochs=6)
    text = markdown_over("temperature", [study, longer])
    assert {line for line, *_ in points(text)} == {f"distilled, {epochs} epochs" for epochs in (3, 6)}
    assert str(study / "over-temperature.png") in text and not (longer / "over-temperature.png").exists()
    same = make_study(tmp_path / "same", tmp_path / "five.h5")
    assert {line for line, *_ in points(markdown_over("temperature", [study, same]))} == {
        "distilled, study",
        "distilled, same",
    }
    namesake = make_study(tmp_path / "b" / "study", tmp_path / "five.h5")
    named = {line for line, *_ in points(markdown_over("temperature", [study, namesake]))}
    assert named == {f"distilled, {study}", f"distilled, {namesake}"}


def test_unfinished_runs_are_left_out(study):
    make_run(study, "few", 2, 0, views=2, status="interrupted")
    assert points(markdown_over("views", [study]))[0] == ("distilled", "2", "few", *shown(10, 12))


def test_other_val_images_are_refused(study, tmp_path):
    make_run(tmp_path / "foreign", "distilled", 0, 4, fingerprint="e" * 64, cache=str(tmp_path / "five.h5"))
    with pytest.raises(UserError, match="is of other val images"):
        markdown_over("views", [study, tmp_path / "foreign"])


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("epochs", "--over epochs has no axis; choose one of views, alpha, temperature, label-fraction, "),
        ("loss", "--over loss has no axis"),
        ("cache", "--over cache has no axis"),
        (
            "weight-decay",
            "differ in weight_decay alone and have finished runs; train them by --grid weight-decay=VALUE,VALUE.",
        ),
    ],
)
def test_what_has_no_axis_or_no_values_is_refused(study, setting, sentence):
    assert sentence in refused(entry.main, "table", study, "--over", setting)
    assert not [*study.glob("over-*")]


def test_the_figures_say_what_a_variant_is_made_of(study):
    study_table.write(study)
    figures = json.loads((study / "results.json").read_text())
    assert figures["variants"]["few"] == "distilled,views=2" and figures["settings"] == {"epochs": 3}


def test_the_command_prints_the_table(study, capsys):
    call(entry.main, "table", study, "--over", "views", "--markdown")
    assert points(capsys.readouterr().out)[0][:3] == ("distilled", "2", "few")
    call(entry.main, "table", study, "--over", "views")
    assert capsys.readouterr().out.splitlines()[1].split() == [
        "distilled",
        "2",
        "few",
        *" ".join(shown(10, 12)).split(),
    ]
    assert "needs --over SETTING" in refused(entry.main, "table", study, study)


def test_a_grids_table_is_followed_by_those_over_its_settings(study):
    document = json.loads((study / "study.json").read_text())
    (study / "study.json").write_text(json.dumps(document | {"grid": ["views", "alpha", "loss"]}))
    study_table.write(study)
    text = (study / "table.md").read_text()
    assert text.count("\n|---|") == 2 and "views of an image" in text  # nothing differs in alpha
    assert (study / "over-views.png").read_bytes().startswith(PNG) and not (study / "over-alpha.png").exists()
