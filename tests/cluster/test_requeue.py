"""Jobs that are stopped from outside resume by themselves, and end with the weights of a run that nobody stopped."""

from kd_dist.run import events
from launch.supervisor import Job

TWO_BY_TWO = "--nodes 2 --gpus-per-node 0 --ranks-per-node 2 --cpus-per-task 1 --time 30m --partition low"


def why_stopped(folder) -> list[str]:
    return [line for line in folder.attempts.read_text(encoding="utf-8").splitlines() if '"why"' in line]


def test_preempted_and_requeued_on_two_nodes_ends_with_the_same_bits(reference, student_options):
    box = reference.box
    (job,) = reference.submit("distill", TWO_BY_TWO, *student_options, "--epochs=30", "--out=again/student")
    job_id = Job.read(job).id

    reference.wait_step("again/student", 5)
    box.run("sbatch", "-p", "high", "-N2", "--ntasks-per-node=8", "-t1", "-o/dev/null", "--wrap=srun sleep 1")
    box.wait_state(job_id, "PENDING")
    first = reference.step("again/student")
    assert reference.state("again/student")["status"] == "interrupted" and 5 <= first < 60
    assert '"why": "preempted"' in why_stopped(job)[0]

    box.release(job_id)
    reference.wait_step("again/student", first + 3)
    box.run("scontrol", "requeue", job_id)
    box.wait_state(job_id, "PENDING")
    box.release(job_id)
    reference.end(job, "COMPLETED")

    assert reference.state("again/student")["status"] == "finished"
    assert job.last_attempt() == 2
    attempts = events.history(events.read(reference.folder / "again/student" / events.NAME)).splitlines()[2:]
    assert "stopped on request, all saved" in attempts[0] and attempts[0].endswith("requeued: preempted |")
    assert len(attempts) == 3 and attempts[2].endswith("| finished |")
    assert "resuming from step" in job.log(1, 0).read_text(encoding="utf-8")
    assert reference.weights("again/student") == reference.weights("runs/student")


def test_a_job_at_its_time_limit_goes_on(reference, student_options):
    where = "--gpus-per-node 0 --time 1m --signal-before 25 --partition low"
    (job,) = reference.submit("distill", where, *student_options, "--epochs=3000", "--out=timed/student")
    job_id = Job.read(job).id
    reference.box.wait_state(job_id, "RUNNING")
    reference.box.wait_state(job_id, "PENDING", seconds=150)
    stopped = reference.step("timed/student")
    assert '"why": "time-out"' in why_stopped(job)[0] and stopped > 0
    reference.box.release(job_id)
    reference.wait_step("timed/student", stopped + 2)
    reference.status("timed", "--cancel")
    reference.end(job, "CANCELLED")


def test_a_dead_node_has_its_job_started_again_from_the_newest_checkpoint(reference, student_options):
    box = reference.box
    where = "--nodes 2 --gpus-per-node 0 --ranks-per-node 1 --cpus-per-task 1 --time 30m"
    (job,) = reference.submit("distill", where, *student_options, "--epochs=200", "--out=dead/student")
    job_id = Job.read(job).id
    reference.wait_step("dead/student", 8)
    box.kill_node("n2")
    box.wait_state(job_id, "PENDING")
    kept = max(
        int(path.stem.removeprefix("step-")) for path in (reference.folder / "dead/student/checkpoints").iterdir()
    )
    box.start_node("n2")
    box.release(job_id)
    reference.wait_step("dead/student", kept + 2)
    assert f"resuming from step {kept} " in job.log(1, 0).read_text(encoding="utf-8")
    assert "stopped" not in job.attempts.read_text(encoding="utf-8")
    reference.status("dead", "--cancel")
    reference.end(job, "CANCELLED")
