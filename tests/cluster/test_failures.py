"""What is shown and kept when a rank dies, when a user cancels, and when two jobs run side by side."""

import os
import signal
import sys

from box import wait_for
from shared import SIZES, log_of

from launch.supervisor import Job

PAIR = "--gpus-per-node 0 --ranks-per-node 2 --cpus-per-task 1 --time 30m"
AGAIN = ("--gpus-per-node", "0", "--", *SIZES, "--out=beside/student")


def test_a_killed_rank_ends_its_job_alone_and_the_next_submission_goes_on(reference, student_options):
    options = (*student_options, "--epochs=400")
    (killed,) = reference.submit("distill", PAIR, *options, "--out=killed/student")
    (beside,) = reference.submit("distill", PAIR, *options, "--out=beside/student")
    reference.wait_step("killed/student", 6)
    reference.wait_step("beside/student", 2)
    first, second = reference.box.facts(Job.read(killed).id), reference.box.facts(Job.read(beside).id)
    assert first["JobState"] == second["JobState"] == "RUNNING"

    os.kill(reference.box.rank_pid("killed/student", 1), signal.SIGKILL)
    reference.end(killed, "FAILED")
    said = reference.status("killed")
    assert f"distill (job {Job.read(killed).id}): rank 1 on n" in said and "killed by SIGKILL" in said

    before = reference.step("beside/student")
    reference.wait_step("beside/student", before + 2)
    refused = reference.command(sys.executable, "-m", "launch.submit", "distill", *AGAIN, *options)
    assert refused.returncode == 2 and f"belongs to job {Job.read(beside).id}" in refused.stderr

    said = reference.status("beside", "--cancel")
    assert "cancelled" in said
    reference.end(beside, "CANCELLED")
    assert reference.state("beside/student")["status"] == "interrupted"
    assert f"step-{reference.step('beside/student'):08d}.pt" in os.listdir(
        reference.folder / "beside/student/checkpoints"
    )

    kept = max(int(name[5:13]) for name in os.listdir(reference.folder / "killed/student/checkpoints"))
    (next_one,) = reference.submit("distill", PAIR, *options, "--out=killed/student")
    wait_for(lambda: f"resuming from step {kept} " in log_of(next_one), 120, lambda: log_of(next_one))
    reference.status("killed", "--cancel")
    reference.end(next_one, "CANCELLED")
