"""The meeting before torch: who cannot reach whom is named within seconds."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from kd_dist.errors import UserError
from launch import meeting
from launch.folders import write_json
from launch.meeting import GivenUp, Hello, Place, meet, unreachable


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def place(rank: int, port: int, world_size: int = 3, address: str = "127.0.0.1") -> Place:
    return Place("7", rank, world_size, rank, world_size, address, port, 0)


def never() -> bool:
    return False


def test_all_ranks_meet_and_leave_the_port_free(tmp_path, port):
    note = tmp_path / "meeting.json"
    with ThreadPoolExecutor(3) as ranks:
        done = [ranks.submit(meet, place(rank, port), note, never) for rank in (2, 1, 0)]
        assert [future.result(timeout=20) for future in done] == [None] * 3
    assert not note.exists()
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("", port))


def test_a_rank_that_cannot_connect_names_address_and_port(tmp_path, port):
    note = tmp_path / "meeting.json"
    write_json(note, {"host": socket.gethostname(), "port": port})  # rank 0 says it listens, but a firewall is between
    with pytest.raises(UserError, match=rf"127.0.0.1:{port} .* cannot be reached from .*Connection refused"):
        meet(place(1, port), note, never, connect_seconds=0.5)


def test_an_address_that_does_not_resolve_is_named_at_once(tmp_path, port):
    with pytest.raises(UserError, match=r"MASTER_ADDR nowhere.invalid .* does not resolve"):
        meet(place(1, port, address="nowhere.invalid"), tmp_path / "meeting.json", never)


def test_a_loopback_address_of_another_machine_is_named(tmp_path, port):
    note = tmp_path / "meeting.json"
    write_json(note, {"host": "another-machine", "port": port})
    with pytest.raises(
        UserError, match=r"resolves to 127.0.0.1 .*, a loopback address .* not to rank 0 on another-machine"
    ):
        meet(place(1, port), note, never)


def test_a_machine_whose_own_name_is_loopback_is_named_unless_an_interface_was_chosen():
    near, far = Hello(0, "a", "10.0.0.1", False), Hello(1, "b", "127.0.1.1", False)
    assert "on node b its own name resolves to 127.0.1.1, a loopback address," in unreachable([near, far])
    assert "on node b its own name does not resolve" in unreachable([near, Hello(1, "b", "", False)])
    assert unreachable([near, Hello(1, "b", "127.0.1.1", True)]) is None
    assert unreachable([Hello(0, "b", "127.0.1.1", False), Hello(1, "b", "127.0.1.1", False)]) is None


def test_trouble_that_rank_0_finds_is_raised_on_all_ranks(tmp_path, port, monkeypatch):
    monkeypatch.setattr(meeting, "unreachable", lambda hellos: f"{len(hellos)} came")
    with ThreadPoolExecutor(3) as ranks:
        done = [ranks.submit(meet, place(rank, port), tmp_path / "meeting.json", never) for rank in range(3)]
        assert [str(future.exception(timeout=20)) for future in done] == ["3 came"] * 3


def test_a_port_in_use_is_named(tmp_path, port):
    with socket.socket() as other:
        other.bind(("", port))
        other.listen()
        with pytest.raises(UserError, match=rf"port {port} .* is taken"):
            meet(place(0, port), tmp_path / "meeting.json", never)


def test_a_stranger_at_the_port_is_passed_over(tmp_path, port):
    note = tmp_path / "meeting.json"
    with ThreadPoolExecutor(2) as ranks:
        main = ranks.submit(meet, place(0, port, 2), note, never)
        while not note.exists():
            pass
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n")
        other = ranks.submit(meet, place(1, port, 2), note, never)
        assert main.result(timeout=20) is None and other.result(timeout=20) is None


@pytest.mark.parametrize("rank", [0, 1])
def test_the_wait_ends_when_the_job_is_to_end(tmp_path, port, rank):
    with pytest.raises(GivenUp):
        meet(place(rank, port), tmp_path / "meeting.json", lambda: True)
