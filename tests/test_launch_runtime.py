"""What kd_dist itself says to launchers other than ours: tasks without ranks, and a rank 0 that cannot be reached."""

import socket

import pytest

from kd_dist.dist import rendezvous, runtime
from kd_dist.errors import UnreachableError, UserError


@pytest.fixture
def environment(monkeypatch):
    """Set variables, on top of an environment without a launcher."""
    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_RUN_ID",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KD_DIST_RENDEZVOUS_SECONDS", "0.5")
    return lambda **values: [monkeypatch.setenv(name, value) for name, value in values.items()]


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_several_tasks_without_ranks_are_refused(environment, name):
    environment(**{name: "3"})
    with pytest.raises(UserError, match="3 tasks were started side by side"), runtime.joined("cpu"):
        pass


def test_one_task_and_tasks_with_ranks_are_welcome(environment):
    environment(SLURM_STEP_NUM_TASKS="1", SLURM_NTASKS="8")
    with runtime.joined("cpu") as joined:
        assert joined.world_size == 1
    environment(SLURM_STEP_NUM_TASKS="3", WORLD_SIZE="1", RANK="0")
    with runtime.joined("cpu") as joined:
        assert joined.world_size == 1


def closed_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.mark.parametrize(
    ("address", "local_world_size", "sentence"),
    [
        ("nowhere.invalid", "1", "MASTER_ADDR nowhere.invalid:.* does not resolve"),
        ("127.0.0.1", "1", r"nothing answers at .* \(127.0.0.1, a loopback address, leads to this machine itself\)"),
        ("127.0.0.1", "2", r"nothing answers at MASTER_ADDR:MASTER_PORT 127.0.0.1:\d+ \(127.0.0.1\)"),
    ],
)
def test_a_rank_0_that_cannot_be_reached_is_named(environment, address, local_world_size, sentence):
    port = closed_port()
    environment(RANK="1", WORLD_SIZE="2", LOCAL_WORLD_SIZE=local_world_size, MASTER_ADDR=address, MASTER_PORT=port)
    with pytest.raises(UnreachableError, match=sentence), runtime.joined("cpu"):
        pass


def test_rank_0s_port_may_open_a_little_later(environment, monkeypatch):
    environment(KD_DIST_RENDEZVOUS_SECONDS="30", MASTER_ADDR="127.0.0.1", MASTER_PORT=closed_port())
    server = socket.socket()
    monkeypatch.setattr(rendezvous.time, "sleep", lambda _seconds: server.getsockname()[1] or open_it())

    def open_it() -> None:
        server.bind(("127.0.0.1", int(rendezvous.os.environ["MASTER_PORT"])))
        server.listen()

    with server:
        rendezvous.check_master_address(1, several_machines=False)


@pytest.mark.parametrize(("visible", "index"), [(1, 0), (4, 3)])
def test_one_visible_gpu_for_each_rank_works_as_well_as_all_of_them(monkeypatch, visible, index):
    monkeypatch.setattr(rendezvous.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(rendezvous.torch.cuda, "device_count", lambda: visible)
    assert rendezvous.choose_device("auto", 3, 4) == rendezvous.torch.device("cuda", index)
