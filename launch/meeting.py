"""Before torch is started: can every rank reach rank 0 at MASTER_ADDR:MASTER_PORT, and would the nodes find each other?

torch waits up to half an hour for ranks that cannot reach rank 0. Here rank 0 listens on that very port, says so in a
file that all nodes see, and every other rank must come within seconds of it. Nodes may start late, so nobody's
patience runs before rank 0 listens.
"""

import ipaddress
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kd_dist.errors import UserError, exit_code_of

from .folders import read_json, write_json

CONNECT_SECONDS = 12.0
START_SECONDS = 300.0
POLL_SECONDS = 0.2
_MEND = (
    "look at /etc/hosts and DNS on that node, or at the firewall between the nodes, or set SITE_INTERFACE in "
    "slurm/site.conf"
)


@dataclass(frozen=True)
class Place:
    """One rank's place in a job, as the launcher tells it."""

    job_id: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str
    port: int
    attempt: int

    def variables(self) -> dict[str, str]:
        """torch's own variables."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


class GivenUp(Exception):
    """The wait ended because the job is to end."""


@dataclass(frozen=True)
class Hello:
    """What a rank tells rank 0: its machine's name, and whether that name leads other machines to it."""

    rank: int
    host: str
    own_address: str
    chosen_interface: bool

    @classmethod
    def mine(cls, rank: int) -> "Hello":
        host = socket.gethostname()
        try:
            own_address = socket.gethostbyname(host)
        except OSError:
            own_address = ""
        return cls(rank, host, own_address, "GLOO_SOCKET_IFNAME" in os.environ)


def meet(place: Place, note: Path, give_up: Callable[[], bool], connect_seconds: float = CONNECT_SECONDS) -> None:
    """Return on every rank once all have met. Raises UserError naming the address and what is wrong, GivenUp when told
    to.
    """
    if place.world_size == 1:
        return
    _resolve(place)
    if place.rank == 0:
        _gather(place, note, give_up)
    else:
        host = _wait_for_note(place, note, give_up)
        _report(place, host, give_up, connect_seconds)


def _resolve(place: Place) -> str:
    try:
        return socket.getaddrinfo(place.address, place.port, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR {place.address} (rank 0's node) does not resolve on {socket.gethostname()} "
            f"({error.strerror or error}); {_MEND}."
        ) from None


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


# ---- rank 0


def _gather(place: Place, note: Path, give_up: Callable[[], bool]) -> None:
    with _listening(place) as server:
        write_json(note, {"host": socket.gethostname(), "port": place.port})
        callers = _callers(server, place.world_size - 1, give_up)
        trouble = unreachable([Hello.mine(0), *(hello for _, hello in callers)])
        for connection, _ in callers:
            with connection:
                connection.sendall((json.dumps(trouble) + "\n").encode())
    note.unlink(missing_ok=True)
    if trouble:
        raise UserError(trouble)


def _listening(place: Place) -> socket.socket:
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.settimeout(POLL_SECONDS)
    try:
        server.bind(("", place.port))
    except OSError as error:
        server.close()
        raise UserError(
            f"port {place.port} (MASTER_PORT, from job id {place.job_id}) on {socket.gethostname()} is taken "
            f"({error.strerror}); "
            "submit the job again: another id gives another port."
        ) from None
    server.listen(128)
    return server


def _callers(server: socket.socket, count: int, give_up: Callable[[], bool]) -> list[tuple[socket.socket, Hello]]:
    callers: dict[int, tuple[socket.socket, Hello]] = {}
    deadline = time.monotonic() + START_SECONDS
    while len(callers) < count:
        _check(
            give_up,
            deadline,
            f"{count - len(callers)} of {count + 1} ranks did not call rank 0 within {START_SECONDS:.0f} s; see their "
            "logs.",
        )
        try:
            connection, _ = server.accept()
            connection.settimeout(5.0)
            hello = Hello(**json.loads(_line(connection)))
        except (OSError, ValueError, TypeError):  # nobody yet, or a stranger such as a port scanner
            continue
        callers[hello.rank] = (connection, hello)
    return list(callers.values())


def unreachable(hellos: list[Hello]) -> str | None:
    """A sentence on the first machine whose own name leads to itself alone, None where all is well or all are one
    machine.
    """
    if len({hello.host for hello in hellos}) == 1:
        return None
    for hello in hellos:
        if not hello.chosen_interface and (not hello.own_address or _is_loopback(hello.own_address)):
            leads = f"resolves to {hello.own_address}, a loopback address," if hello.own_address else "does not resolve"
            return (
                f"on node {hello.host} its own name {leads} so other nodes could not reach rank {hello.rank} there; "
                f"{_MEND}."
            )
    return None


# ---- the others


def _wait_for_note(place: Place, note: Path, give_up: Callable[[], bool]) -> str:
    deadline = time.monotonic() + START_SECONDS
    while True:
        _check(give_up, deadline, f"rank 0 did not start on {place.address} within {START_SECONDS:.0f} s; see its log.")
        document = read_json(note)
        if document and document["port"] == place.port:
            return document["host"]
        time.sleep(POLL_SECONDS)


def _report(place: Place, host_of_main: str, give_up: Callable[[], bool], connect_seconds: float) -> None:
    address = _resolve(place)
    here = socket.gethostname()
    if _is_loopback(address) and here != host_of_main:
        raise UserError(
            f"MASTER_ADDR {place.address} resolves to {address} on {here}, a loopback address that leads to {here} "
            "itself and not to "
            f"rank 0 on {host_of_main}; {_MEND}."
        )
    with _connected(place, address, give_up, connect_seconds) as connection:
        connection.sendall((json.dumps(vars(Hello.mine(place.rank))) + "\n").encode())
        connection.settimeout(START_SECONDS)
        try:
            trouble = json.loads(_line(connection))
        except (OSError, ValueError):
            raise UserError(
                f"rank 0 at {place.address}:{place.port} went away before all ranks had met; see its log."
            ) from None
    if trouble:
        raise UserError(trouble)


def _connected(place: Place, address: str, give_up: Callable[[], bool], seconds: float) -> socket.socket:
    deadline = time.monotonic() + seconds
    said = "no answer"
    while True:
        closed = (
            f"{place.address}:{place.port} ({address}; MASTER_ADDR:MASTER_PORT) cannot be reached from "
            f"{socket.gethostname()}, though rank 0 "
            f"listens there ({said}); {_MEND}."
        )
        _check(give_up, deadline, closed)
        try:
            return socket.create_connection((address, place.port), timeout=min(5.0, seconds))
        except OSError as error:
            said = error.strerror or str(error)
            time.sleep(POLL_SECONDS)


def _check(give_up: Callable[[], bool], deadline: float, sentence: str) -> None:
    if give_up():
        raise GivenUp
    if time.monotonic() > deadline:
        raise UserError(sentence)


def _line(connection: socket.socket) -> str:
    with connection.makefile("r", encoding="utf-8") as file:
        line = file.readline(10_000)
    if not line:
        raise ValueError("the caller hung up")
    return line


def main(arguments: list[str]) -> None:
    """For slurm/job.sh, one task a node: HOST PORT NOTE."""
    host, port, note = arguments
    rank, count = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    place = Place(os.environ["SLURM_JOB_ID"], rank, count, 0, 1, host, int(port), restarts)
    meet(place, Path(f"{note}-{restarts}"), give_up=lambda: False)


if __name__ == "__main__":
    sys.exit(exit_code_of("launch.meeting", lambda: main(sys.argv[1:])))
