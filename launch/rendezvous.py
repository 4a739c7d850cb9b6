"""Before torch is started: can every rank reach rank 0 at MASTER_ADDR:MASTER_PORT, and will the nodes find each other?

torch waits up to half an hour for ranks that cannot reach rank 0, and gloo takes each machine's own name for its
address. Here rank 0 listens on that port and publishes this in a file that all nodes see; every other rank must
connect within seconds. Nodes may start late, so no time-out runs before rank 0 listens.
"""

import contextlib
import errno
import ipaddress
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kd_dist.errors import UserError
from kd_dist.files import read_json, write_json

CONNECT_SECONDS = 12.0
START_SECONDS = 300.0
POLL_SECONDS = 0.2
_MEND = (
    "look at /etc/hosts and DNS on that node, or at the firewall between the nodes, or set SITE_INTERFACE in "
    "slurm/site.conf"
)


@dataclass(frozen=True)
class DistributedEnvironment:
    """One rank of a job: torch's distributed environment variables, and which attempt it is."""

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
        names = ("rank", "world_size", "local_rank", "local_world_size")
        values = {name.upper(): str(getattr(self, name)) for name in names}
        return {**values, "MASTER_ADDR": self.address, "MASTER_PORT": str(self.port)}


class Aborted(Exception):
    """The wait ended because the job is to end."""


def wait_for_all_ranks(
    env: DistributedEnvironment, note: Path, abort: Callable[[], bool], connect_seconds: float = CONNECT_SECONDS
) -> None:
    """Return on every rank once all have connected to rank 0. `note` is a file that all nodes see.

    Raises UserError naming the address and what is wrong, Aborted once `abort` returns True.
    """
    if env.world_size == 1:
        return
    try:
        address = str(socket.getaddrinfo(env.address, env.port, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR {env.address} (rank 0's node) does not resolve on {socket.gethostname()} "
            f"({error.strerror or error}); {_MEND}."
        ) from None
    if env.rank == 0:
        _listen(env, note, abort)
    else:
        _connect(env, address, _rank_0(env, note, abort), abort, connect_seconds)


def _listen(env: DistributedEnvironment, note: Path, abort: Callable[[], bool]) -> None:
    """Rank 0: let all others connect, then free the port and release them."""
    try:
        server = socket.create_server(("", env.port), backlog=128)
    except OSError as error:
        raise UserError(
            f"port {env.port} (MASTER_PORT, from job id {env.job_id}) on {socket.gethostname()} is taken "
            f"({os.strerror(error.errno or errno.EADDRINUSE)}); submit the job again: another id gives another port."
        ) from None
    with server, contextlib.ExitStack() as connections:
        server.settimeout(POLL_SECONDS)
        write_json(note, {"port": env.port, **_machine()})
        others: dict[str, socket.socket] = {}
        deadline = time.monotonic() + START_SECONDS
        while missing := env.world_size - 1 - len(others):
            late = f"{missing} of {env.world_size} ranks did not connect to rank 0 within {START_SECONDS:.0f} s"
            _check(abort, deadline, f"{late}; see their logs.")
            with contextlib.suppress(OSError):  # nobody yet, or a stranger that sends nothing
                connection = connections.enter_context(server.accept()[0])
                connection.settimeout(5.0)
                line = connection.makefile("r", encoding="utf-8", errors="replace").readline(100)
                if line.startswith(f"{env.job_id} "):
                    others[line] = connection
        server.close()
        note.unlink(missing_ok=True)
        for connection in others.values():
            with contextlib.suppress(OSError):
                connection.sendall(b"go\n")


def _machine() -> dict[str, str | None]:
    """This machine's name, and what is wrong with the address that it resolves to here (None: nothing)."""
    host, address = socket.gethostname(), None
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(host)
    wrong = "does not resolve" if address is None else None
    if address and _is_loopback(address):
        wrong = f"resolves to {address}, a loopback address,"
    return {"host": host, "wrong": None if "GLOO_SOCKET_IFNAME" in os.environ else wrong}


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _rank_0(env: DistributedEnvironment, note: Path, abort: Callable[[], bool]) -> dict[str, str | None]:
    """Rank 0's machine, once it listens."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        _check(abort, deadline, f"rank 0 did not start on {env.address} within {START_SECONDS:.0f} s; see its log.")
        document = read_json(note, mend="see rank 0's log.")
        if document and document["port"] == env.port:
            return document
        time.sleep(POLL_SECONDS)


def _connect(
    env: DistributedEnvironment, address: str, rank_0: dict, abort: Callable[[], bool], seconds: float
) -> None:
    """The other ranks: connect to rank 0, and wait until all have."""
    here = _machine()
    if here["host"] != rank_0["host"]:
        _refuse_loopback(env, address, here, rank_0)
    deadline, answer = time.monotonic() + seconds, "no answer"
    while True:
        closed = f"{env.address}:{env.port} ({address}; MASTER_ADDR:MASTER_PORT) cannot be reached from {here['host']}"
        _check(abort, deadline, f"{closed}, though rank 0 listens there ({answer}); {_MEND}.")
        try:
            connection = socket.create_connection((address, env.port), timeout=min(5.0, seconds))
            break
        except OSError as error:
            answer = error.strerror or str(error)
            time.sleep(POLL_SECONDS)
    with connection:
        connection.settimeout(START_SECONDS)
        reply = b""
        with contextlib.suppress(OSError):
            connection.sendall(f"{env.job_id} {env.rank}\n".encode())
            reply = connection.recv(10)
    if reply != b"go\n":
        raise UserError(f"rank 0 at {env.address}:{env.port} ended before all ranks had connected; see its log.")


def _refuse_loopback(env: DistributedEnvironment, address: str, here: dict, rank_0: dict) -> None:
    if _is_loopback(address):
        raise UserError(
            f"MASTER_ADDR {env.address} resolves to {address} on {here['host']}, a loopback address that reaches "
            f"{here['host']} itself and not to rank 0 on {rank_0['host']}; {_MEND}."
        )
    for machine in (here, rank_0):
        if machine["wrong"]:
            raise UserError(
                f"on node {machine['host']} its own name {machine['wrong']} so other nodes could not reach it; {_MEND}."
            )


def _check(abort: Callable[[], bool], deadline: float, sentence: str) -> None:
    if abort():
        raise Aborted
    if time.monotonic() > deadline:
        raise UserError(sentence)
