"""A real TensorBoard in a headless Chromium, on a small teacher, a hard-label baseline and a distilled student that was
stopped and resumed at another number of ranks.

Skipped where there is no chromium; tests/browser/setup.sh installs it. KD_DIST_RUNS names a folder of finished runs to
look at instead, and KD_DIST_SCREENSHOTS a folder to leave pictures of the pages in.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ranks import run_command
from webdriver import Browser, browser, get, served

from kd_dist.data.generated import generate
from kd_dist.run.curves import CHARTS, OVERVIEW, TAGS
from kd_dist.run.folder import RunFolder
from kd_dist.run.metrics import read_metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.integration,
    pytest.mark.skipif(not all(map(shutil.which, ("chromium", "chromedriver"))), reason="no chromium here"),
]
ROOT = Path(__file__).resolve().parents[2]
NAMES = ("distilled", "hard", "teacher")
PICTURES = ("1_batch", "2_mistakes", "3_disagreements", "4_confusion", "5_reliability", "6_top1_of_each_class")
SIZES = ("--image-size=32", "--batch-size=24", "--warmup-epochs=0.5", "--lr=0.02", "--device=cpu", "--epochs=2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The folder of the three runs."""
    if "KD_DIST_RUNS" in os.environ:
        return Path(os.environ["KD_DIST_RUNS"])
    folder = tmp_path_factory.mktemp("browser")
    generate(folder / "data", train_per_class=12, val_per_class=5)
    flags, runs = (f"--data={folder / 'data'}", *SIZES), folder / "runs"
    run_command("kd_dist.teacher", *flags, "--views=3", f"--out={runs / 'teacher'}", ranks=2)
    cached = f"--cache={runs / 'teacher' / 'logits.h5'}"
    run_command("kd_dist.distill", *flags, cached, "--alpha=0", f"--out={runs / 'hard'}")
    student = ("kd_dist.distill", *flags, cached, "--epochs=8", f"--out={runs / 'distilled'}")
    stop_after_a_checkpoint(RunFolder(runs / "distilled"), *student, "--checkpoint-minutes=0.0001")
    run_command(*student)
    return runs


def stop_after_a_checkpoint(folder: RunFolder, *words: str) -> None:
    """Start a command on two ranks and send it SIGTERM once it has saved."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen([sys.executable, *torchrun, *words], env=environment, stdout=subprocess.DEVNULL, stderr=-3)
    deadline = time.monotonic() + 240
    while not folder.saved_steps() and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert job.wait(240) != 0


@pytest.fixture(scope="module")
def address(runs) -> Iterator[str]:
    """Where TensorBoard shows these runs."""
    tensorboard = Path(sys.executable).with_name("tensorboard")
    command = (tensorboard, "--logdir", runs, "--host=127.0.0.1")
    with served(*command, ready=lambda address: len(get(f"{address}/data/runs")) >= len(NAMES)) as address:
        yield address


@pytest.fixture(scope="module")
def page(address) -> Iterator[Callable[[str], Browser]]:
    """Opens a dashboard by its name in the address, "" for what comes first."""
    with browser(1600, 2200) as window:

        def opened(name: str) -> Browser:
            window.open(f"{address}/#{name}" if name else address)
            window.wait_for(lambda: "TensorBoard" in window.text(), "page of TensorBoard")
            return window

        yield opened


def keep(window: Browser, name: str) -> None:
    """A screenshot, where one is asked for."""
    if "KD_DIST_SCREENSHOTS" in os.environ:
        time.sleep(3)  # for animations
        window.screenshot(Path(os.environ["KD_DIST_SCREENSHOTS"]) / f"{name}.png")


def test_the_first_page_shows_the_overview_from_the_top_in_its_order(page):
    window = page("")
    wanted = [tag.removeprefix(OVERVIEW) for tag in TAGS.values()]  # a title is a group and the rest of the tag

    def cards() -> list[tuple[float, float, str]]:
        return sorted(piece for piece in window.seen() if piece[2].startswith("/"))

    window.wait_for(lambda: len(cards()) >= len(wanted), "cards")
    keep(window, "time_series")
    first = cards()[: len(wanted)]
    assert [text for _, _, text in first] == wanted
    assert all(top < 2200 for top, _, _ in first), "all are open"
    seen = window.text()
    assert "TIME SERIES" in seen.upper() and all(name in seen for name in NAMES)
    checked = window.all("input[type=checkbox]", "return element.checked")
    assert checked.count(True) >= len(NAMES), "all runs are shown without a click"


def test_custom_scalars_has_the_charts_of_the_first_screen(page):
    window = page("custom_scalars")
    titles = window.wait_for(lambda: ordered(window, CHARTS), "charts")
    assert titles[:3] == list(CHARTS)[:3] and titles == list(CHARTS)
    assert all(top < 1057 for top, _, text in window.seen() if text in CHARTS), "on one screen"
    keep(window, "custom_scalars")
    matches = [text for _, _, text in sorted(window.seen()) if text.startswith("Matches")]
    assert matches[0] == "Matches (5)", "top-1 of three runs, and the teacher's beside two students'"


def ordered(window: Browser, titles) -> list[str]:
    """These titles as they stand on the page, once all are there."""
    found = [text for _, _, text in sorted(window.seen()) if text in titles]
    return found if len(found) == len(titles) else []


def test_images_are_shown(page):
    window = page("images")

    def widths() -> list[int]:
        return [width for width in window.all("img", "return element.naturalWidth") if width > 100]

    window.wait_for(lambda: len(widths()) >= 2, "pictures")
    keep(window, "images")
    assert all(f"5_pictures/{name}" in window.text() for name in PICTURES[:2])


def test_every_picture_is_served_and_is_one(address, runs):
    found = get(f"{address}/data/plugin/images/tags")
    for run in ("distilled", "hard"):
        assert {f"5_pictures/{name}" for name in PICTURES} == found[run].keys()
    assert "5_pictures/3_disagreements" not in found["teacher"]
    query = "run=distilled&sample=0&tag=5_pictures/4_confusion"
    last = get(f"{address}/data/plugin/images/images?{query}")[-1]
    with urllib.request.urlopen(f"{address}/data/plugin/images/individualImage?{last['query']}", timeout=30) as reply:
        assert reply.headers["Content-Type"] == "image/png" and reply.read(4) == b"\x89PNG"


def test_hparams_has_each_run_with_its_final_scores(page, runs):
    window = page("hparams")
    window.wait_for(lambda: all(name in window.text() for name in ("alpha", *NAMES)), "table of runs")
    keep(window, "hparams")
    for name in NAMES:
        final = read_metrics(RunFolder(runs / name))[-1]["val_top1"]
        assert f"{final:#.5g}" in window.text(), f"top-1 of {name}"


def test_there_is_no_run_beside_the_three(address):
    assert sorted(get(f"{address}/data/runs")) == sorted(NAMES)


def test_texts_hold_command_settings_versions_identity_and_hosts(page, address, runs):
    window = page("text")
    window.wait_for(lambda: "python -m kd_dist.distill" in window.text(), "command")
    keep(window, "text")
    tags = get(f"{address}/data/plugin/text/tags")["distilled"]
    texts = {tag: get(f"{address}/data/plugin/text/text?run=distilled&tag={tag}")[-1]["text"] for tag in sorted(tags)}
    assert "alpha" in texts["run/2_settings/text_summary"] and "torch" in texts["run/3_versions/text_summary"]
    assert "fingerprint" in texts["run/4_data_and_cache/text_summary"]
    assert "cache SHA-256" in texts["run/4_data_and_cache/text_summary"]
    assert "rank 0" in texts["run/5_hosts/text_summary"]


@pytest.mark.skipif("KD_DIST_RUNS" in os.environ, reason="other runs")
def test_a_resumed_run_has_single_curves_and_its_markers(page, address):
    """It was stopped on two ranks and went on on one."""
    for tag in (TAGS["top1"], TAGS["train_soft"], "2_health/goodput", "2_health/attempts"):
        points = get(f"{address}/data/plugin/scalars/scalars?run=distilled&tag={tag}")
        assert [step for _, step, _ in points] == [120 * epoch for epoch in range(1, 9)], tag
    attempts = [value for _, _, value in get(f"{address}/data/plugin/scalars/scalars?run=distilled&tag={tag}")]
    assert attempts[-1] == 2
    window = page("text")
    window.wait_for(lambda: "stopped on request, all saved: stopped by SIGTERM" in window.text(), "marker")


def test_the_scalars_page_loads(page):
    window = page("scalars")
    window.wait_for(lambda: "1_overview" in window.text(), "group of scalars")
