"""The two limits on how often a job starts again."""

import pytest

from kd_dist.errors import UserError
from launch.restarts import PREEMPTED, TIME_OUT, Journal, _seconds, progress_of


def test_two_restarts_without_a_new_checkpoint_end_the_job_and_name_both_logs(tmp_path):
    journal = Journal(tmp_path / "attempts.jsonl")
    journal.begin((100, 0), "log-0")
    journal.stopped(PREEMPTED, 3)
    journal.begin((100, 0), "log-1")
    with pytest.raises(UserError, match=r"step 100.*log-0 and log-1"):
        journal.begin((100, 0), "log-2")


@pytest.mark.parametrize("later", [(101, 0), (100, 1), (100, -1)])
def test_a_new_step_or_a_new_block_is_progress(tmp_path, later):
    journal = Journal(tmp_path / "attempts.jsonl")
    journal.begin((100, 0), "log-0")
    journal.begin((100, 0), "log-1")
    journal.begin(later, "log-2")
    journal.begin(later, "log-3")
    with pytest.raises(UserError, match="log-2 and log-3"):
        journal.begin(later, "log-4")


def test_only_time_outs_are_counted_against_their_limit(tmp_path):
    journal = Journal(tmp_path / "attempts.jsonl")
    for step, why in enumerate([TIME_OUT, PREEMPTED, PREEMPTED]):
        journal.begin((step, 0), "log")
        journal.stopped(why, 1)
    journal.begin((9, 0), "log")
    with pytest.raises(UserError, match="came 2 times and --max-timeouts is 1"):
        journal.stopped(TIME_OUT, 1)


def test_progress_is_the_newest_checkpoint_and_the_blocks_of_the_cache(tmp_path):
    cache = tmp_path / "logits.h5"
    assert progress_of(tmp_path, cache) == (0, 0)
    (tmp_path / "checkpoints").mkdir()
    for step in (8, 16):
        (tmp_path / f"checkpoints/step-{step:08d}.pt").touch()
    (tmp_path / "logits.h5.shards").mkdir()
    (tmp_path / "logits.h5.shards/block").touch()
    assert progress_of(tmp_path, cache) == (16, 1)
    cache.touch()
    assert progress_of(tmp_path, cache) == (16, -1)
    assert progress_of(tmp_path, None) == (16, 0)


@pytest.mark.parametrize(
    ("left", "seconds"), [("0:30", 30), ("1:02:03", 3723), ("2-00:00:01", 172801), ("UNLIMITED", float("inf"))]
)
def test_the_time_left_as_squeue_writes_it(left, seconds):
    assert _seconds(left) == seconds
