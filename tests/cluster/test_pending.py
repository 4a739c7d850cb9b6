"""A job that waits in the queue keeps the code it was submitted with, and decodes onto the disk it was told to."""

import re
import shutil
import subprocess
import sys

from shared import ROOT, SIZES, log_of

from launch.supervisor import Job


def test_editing_the_tree_leaves_a_pending_job_alone_and_its_images_go_to_scratch(reference, student_options, tmp_path):
    tree, site, scratch = tmp_path / "tree", tmp_path / "site.conf", tmp_path / "scratch"
    for package in ("kd_dist", "launch"):
        shutil.copytree(ROOT / package, tree / package)
    text = (ROOT / "slurm/site.conf").read_text(encoding="utf-8")
    site.write_text(re.sub('^SITE_OPTIONS=""', 'SITE_OPTIONS="--hold"', text, flags=re.MULTILINE), encoding="utf-8")
    before = set(reference.job_folders())
    where = ["--gpus-per-node", "0", "--time", "20m", "--site", str(site), "--scratch", str(scratch)]
    own = ["--", *SIZES, *student_options, "--epochs=2", "--out=pending/student"]
    environment = {**reference.box.environment, "PYTHONPATH": str(tree)}
    command = [sys.executable, "-m", "launch.submit", "distill", *where, *own]
    done = subprocess.run(command, cwd=reference.folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (folder,) = set(reference.job_folders()) - before
    job = Job.read(folder).id
    assert reference.box.facts(job)["JobState"] == "PENDING"

    (tree / "kd_dist" / "distill.py").write_text("raise SystemExit('the edited tree ran')", encoding="utf-8")
    (tree / "launch" / "supervisor.py").write_text("raise SystemExit('the edited tree ran')", encoding="utf-8")
    reference.box.run("scontrol", "release", job)
    reference.end(folder, "COMPLETED", "FAILED", "CANCELLED")
    assert reference.state("pending/student").get("status") == "finished", log_of(folder)
    assert list(scratch.rglob("train-*.u8")) and list(scratch.rglob("val-*.u8"))
