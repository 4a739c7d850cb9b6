"""Teacher, cache and student on two nodes x two ranks, through Slurm; what comes of a pipeline whose teacher fails."""

import sys

from launch.supervisor import Job


def test_a_pipeline_ends_with_a_student_and_a_second_one_has_nothing_to_do(reference):
    teacher, student = [folder for folder in reference.job_folders() if folder.path.parent.parent.name == "runs"][:2]
    assert reference.state("runs/teacher")["status"] == reference.state("runs/student")["status"] == "finished"
    assert (reference.folder / "runs/teacher/logits.h5.sha256").exists()
    for folder in (teacher, student):
        logs = sorted(path.name for path in folder.attempt(0).glob("rank-*.log"))
        assert logs == ["rank-0.log", "rank-1.log", "rank-2.log", "rank-3.log"]
    assert "wrote" in teacher.main_log.read_text(encoding="utf-8")
    table = reference.status("runs").splitlines()
    assert [row.split()[2] for row in table[1:3]] == ["finished", "finished"]
    assert "30/30" in table[2] and "%" in table[1]

    assert reference.submit_pipeline() == []


def test_a_run_of_other_settings_is_refused_before_it_waits_in_the_queue(reference):
    own = ("--preset=demo", "--epochs=31")
    done = reference.command(sys.executable, "-m", "launch.submit", "pipeline", "--gpus-per-node", "0", "--", *own)
    assert done.returncode == 2 and "--epochs was 4, now 31" in done.stderr


def test_a_failed_teacher_drops_the_student_and_status_says_why(cluster):
    teacher, student = cluster.submit(
        "pipeline", "--gpus-per-node 0 --time 20m --runs failing", "--data=data", "--teacher=nonet"
    )
    cluster.end(teacher, "FAILED")
    cluster.end(student, "CANCELLED")
    said = cluster.status("failing")
    rows = said.splitlines()
    assert rows[1].split()[2] == "failed" and rows[2].split()[2] == "dropped"
    assert f"distill (job {Job.read(student).id}): dropped: teacher (job {Job.read(teacher).id}) failed" in said
    assert (
        "rank 0 on n1 failed, exit code 2" in said
        and "--teacher nonet is not known" in said.split("rank 0 on n1 failed")[1]
    )


def test_unknown_partitions_are_refused_in_slurms_words(cluster):
    done = cluster.command(
        *(sys.executable, "-m", "launch.submit", "teacher", "--partition", "gold", "--", "--out=other/teacher")
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "invalid partition specified: gold" in done.stderr
    assert not list((cluster.folder / "other/jobs").glob("0*"))


def test_tasks_without_ranks_are_refused_once(cluster):
    done = cluster.command(
        "srun", "-n3", sys.executable, "-m", "kd_dist.distill", "--alpha=0", "--data=data", "--out=stray"
    )
    assert done.returncode == 2
    sentences = [line for line in done.stderr.splitlines() if line.startswith("kd_dist:")]
    assert len(sentences) == 1 and "3 tasks were started side by side" in sentences[0]
    assert not (cluster.folder / "stray").exists()


def test_the_snapshot_is_what_runs(reference):
    folder = reference.job_folders()[0]
    sheet = next(folder.submitit.glob("*_submission.sh")).read_text(encoding="utf-8")
    assert f"export PYTHONPATH={folder.path}/code\nexport PYTHONSAFEPATH=1" in sheet
    assert (folder.path / "code/kd_dist/teacher.py").exists()
