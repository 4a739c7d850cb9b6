"""One cache, several students: an array whose workers share the runs of one study."""

from box import wait_for
from shared import log_of

from kd_dist.run import events
from kd_dist.run.events import Code
from launch.supervisor import Job


def test_a_study_is_one_array_whose_workers_share_its_runs(reference, student_options):
    where = "--gpus-per-node 0 --time 20m --runs studied --array 2 --arms baseline-cached distilled --seeds 3 4"
    jobs = reference.submit("study", where, *student_options, "--epochs=20")
    ids = [Job.read(folder).id for folder in jobs]
    array = ids[0].split("_")[0]
    assert ids == [f"{array}_0", f"{array}_1"]

    def over() -> bool:
        states = reference.box.run("squeue", "-h", "-r", "-t", "all", "-j", array, "-o", "%T").split()
        assert "FAILED" not in states, "".join(map(log_of, jobs))
        return states == ["COMPLETED"] * 2

    wait_for(over, 300, lambda: reference.status("studied"))
    by_job = {}
    for arm in ("baseline-cached", "distilled"):
        for seed in (3, 4):
            run = f"studied/study/{arm}/seed-{seed}"
            assert reference.state(run)["status"] == "finished"
            log = events.read(reference.folder / run / events.NAME)
            workers = {event["job"] for event in log if event["code"] == Code.EPOCH_FINISHED}
            assert len(workers) == 1, "a run was trained by both workers"
            by_job.setdefault(workers.pop(), []).append(run)
    assert set(by_job) <= {folder.name for folder in jobs}
    table = (reference.folder / "studied/study/table.md").read_text(encoding="utf-8")
    assert "baseline-cached" in table and "distilled" in table
    rows = reference.status("studied").splitlines()[1:]
    assert [row.split()[1:4] for row in rows] == [["study", job_id, "finished"] for job_id in ids]
