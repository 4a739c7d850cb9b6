"""One cache, several students: an array with a limit on how many run at once."""

from box import wait_for

from launch.folders import Job


def test_a_sweep_is_one_array_and_keeps_to_its_limit(reference, student_options):
    where = "--gpus-per-node 0 --time 20m --at-once 1 --runs swept --alpha 0 0.5 --temperature 2 --seed 3"
    jobs = reference.submit("sweep", where, *student_options, "--epochs=2")
    ids = [Job.read(folder).id for folder in jobs]
    array = ids[0].split("_")[0]
    assert ids == [f"{array}_0", f"{array}_1"]
    most = 0

    def over() -> bool:
        nonlocal most
        states = reference.box.run("squeue", "-h", "-r", "-t", "all", "-j", array, "-o", "%T").split()
        most = max(most, states.count("RUNNING"))
        return states == ["COMPLETED"] * 2

    wait_for(over, 200, lambda: reference.status("swept"))
    assert most == 1
    for name in ("alpha-0_seed-3", "alpha-0.5_temperature-2_seed-3"):
        assert reference.state(f"swept/sweep/{name}")["status"] == "finished"
    rows = reference.status("swept").splitlines()[1:]
    assert [row.split()[1:4] for row in rows] == [
        ["alpha-0_seed-3", ids[0], "finished"],
        ["alpha-0.5_temperature-2_seed-3", ids[1], "finished"],
    ]
