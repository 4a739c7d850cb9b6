"""Before torch starts: who cannot reach whom is named within seconds."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from kd_dist.errors import UserError
from kd_dist.files import write_json
from launch import rendezvous
from launch.rendezvous import Aborted, DistributedEnvironment, wait_for_all_ranks


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def env(rank: int, port: int, world_size: int = 3, address: str = "127.0.0.1") -> DistributedEnvironment:
    return DistributedEnvironment("7", rank, world_size, rank, world_size, address, port, 0)


def never() -> bool:
    return False


def test_all_ranks_connect_and_leave_the_port_free(tmp_path, port):
    note = tmp_path / "rendezvous.json"
    with ThreadPoolExecutor(3) as ranks:
        done = [ranks.submit(wait_for_all_ranks, env(rank, port), note, never) for rank in (2, 1, 0)]
        assert [future.result(timeout=20) for future in done] == [None] * 3
    assert not note.exists()
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("", port))


def test_a_rank_that_cannot_connect_names_address_and_port(tmp_path, port):
    note = tmp_path / "rendezvous.json"
    write_json(
        note, {"host": socket.gethostname(), "port": port, "wrong": None}
    )  # rank 0 says it listens, but a firewall is between
    with pytest.raises(UserError, match=rf"127.0.0.1:{port} .* cannot be reached from .*Connection refused"):
        wait_for_all_ranks(env(1, port), note, never, connect_seconds=0.5)


def test_an_address_that_does_not_resolve_is_named_at_once(tmp_path, port):
    with pytest.raises(UserError, match=r"MASTER_ADDR nowhere.invalid .* does not resolve"):
        wait_for_all_ranks(env(1, port, address="nowhere.invalid"), tmp_path / "rendezvous.json", never)


def test_a_loopback_address_of_another_machine_is_named(tmp_path, port):
    note = tmp_path / "rendezvous.json"
    write_json(note, {"host": "another-machine", "port": port, "wrong": None})
    with pytest.raises(
        UserError, match=r"resolves to 127.0.0.1 .*, a loopback address .* not to rank 0 on another-machine"
    ):
        wait_for_all_ranks(env(1, port), note, never)


@pytest.mark.parametrize(
    ("own_address", "interface", "wrong"),
    [
        ("127.0.1.1", None, "resolves to 127.0.1.1, a loopback address,"),
        (None, None, "does not resolve"),
        ("127.0.1.1", "ib0", None),
        ("10.0.0.1", None, None),
    ],
)
def test_what_is_wrong_with_a_machines_own_name(monkeypatch, own_address, interface, wrong):
    def look_up(_host: str) -> str:
        if own_address is None:
            raise OSError
        return own_address

    monkeypatch.setattr(rendezvous.socket, "gethostbyname", look_up)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    if interface:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    assert rendezvous._machine() == {"host": socket.gethostname(), "wrong": wrong}


@pytest.mark.parametrize(("here", "there", "named"), [("resolves to x", None, "here"), (None, "does not resolve", "b")])
def test_a_machine_whose_own_name_is_loopback_is_named_unless_all_are_one(
    tmp_path, port, monkeypatch, here, there, named
):
    note = tmp_path / "rendezvous.json"
    write_json(note, {"host": "b", "port": port, "wrong": there})
    monkeypatch.setattr(rendezvous, "_machine", lambda: {"host": "here", "wrong": here})
    monkeypatch.setattr(rendezvous, "_is_loopback", lambda address: False)
    with pytest.raises(UserError, match=f"on node {named} its own name {here or there} so other nodes could not"):
        wait_for_all_ranks(env(1, port), note, never)
    write_json(note, {"host": "here", "port": port, "wrong": there})
    with pytest.raises(UserError, match="cannot be reached"):  # the same machine: no word about names
        wait_for_all_ranks(env(1, port), note, never, connect_seconds=0.2)


def test_rank_0_that_ends_early_is_named(tmp_path, port):
    note = tmp_path / "rendezvous.json"
    write_json(note, {"host": socket.gethostname(), "port": port, "wrong": None})
    with socket.create_server(("127.0.0.1", port)) as server, ThreadPoolExecutor(1) as ranks:
        other = ranks.submit(wait_for_all_ranks, env(1, port), note, never)
        server.accept()[0].close()
        assert "ended before all ranks had connected" in str(other.exception(timeout=20))


def test_a_port_in_use_is_named(tmp_path, port):
    with socket.socket() as other:
        other.bind(("", port))
        other.listen()
        with pytest.raises(UserError, match=rf"port {port} .* is taken"):
            wait_for_all_ranks(env(0, port), tmp_path / "rendezvous.json", never)


def test_a_stranger_at_the_port_is_passed_over(tmp_path, port):
    note = tmp_path / "rendezvous.json"
    with ThreadPoolExecutor(2) as ranks:
        main = ranks.submit(wait_for_all_ranks, env(0, port, 2), note, never)
        while not note.exists():
            pass
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n")
        other = ranks.submit(wait_for_all_ranks, env(1, port, 2), note, never)
        assert main.result(timeout=20) is None and other.result(timeout=20) is None


@pytest.mark.parametrize("rank", [0, 1])
def test_the_wait_ends_when_the_job_is_to_end(tmp_path, port, rank):
    with pytest.raises(Aborted):
        wait_for_all_ranks(env(rank, port), tmp_path / "rendezvous.json", lambda: True)
