"""How the ranks of a job learn that one of them is gone, even while they wait in C code.

A rank that waits in a collective waits in C: Python's signal handlers do not run there, and NCCL does not notice that a
peer on the same machine was killed. So each rank holds one TCP connection to rank 0, and a thread of its own reads it.
The kernel closes the connection of a process the moment it dies, however it dies. A rank that fails sends its reason
first, and rank 0 passes reasons on. A process that is stopped (SIGSTOP) or hangs keeps its connection but sends no more
heartbeats. The store of torch.distributed cannot do this: it does not tell when a client dies, and a client that waits
in one thread blocks every other thread.
"""

import contextlib
import hmac
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch.distributed as dist

from kd_dist.errors import EXIT_PEER_LOST, Failure, UnreachableError, UserError

KEY = "kd_dist/watch"
HEARTBEAT_SECONDS = 1.0
# Longer than a file server is away when it restarts: reading a mapped file then stops even this thread, because the
# page fault holds Python's lock. KD_DIST_SILENCE_SECONDS changes it.
LEAVE_SECONDS = 2.0  # for the peers to read that this rank leaves
SILENCE_SECONDS = 120.0
CONNECT_SECONDS = 10.0
GO_ON = "run the same command again to resume from the last checkpoint."


@dataclass
class Peer:
    """A rank at the other end of a connection, and the heartbeats it has missed."""

    rank: int
    host: str
    missed: int = 0

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


class Watch:
    """One rank's thread that watches its peers, and its parent: a launcher that is killed cannot end its ranks.

    `on_failure` runs in that thread and is to end the process.
    """

    def __init__(self, rank: int, on_failure: Callable[[Failure], None]):
        self.failure: Failure | None = None
        self.stopped_by: int | None = None  # the signal on which a peer has left
        self._own, self._on_failure = Peer(rank, socket.gethostname()), on_failure
        self._peers: dict[Connection, Peer] = {}
        self._lock = threading.RLock()  # a signal handler may send while the main thread does
        self._parent = os.getppid()
        self._left = self._leaving = False
        self._silence = float(os.environ.get("KD_DIST_SILENCE_SECONDS", SILENCE_SECONDS))
        # A data loader's forked process would hold the connections open when its rank is dead.
        os.register_at_fork(after_in_child=self._forget_in_child)
        threading.Thread(target=self._run, name="kd_dist-watch", daemon=True).start()

    # ---- what the main thread calls

    def connect(self, world_size: int, one_machine: bool, store: dist.Store, seconds: float) -> None:
        """Connect all ranks to rank 0; every rank calls it. Raises UserError where one does not come in time."""
        if self._own.rank == 0:
            self._accept(world_size, one_machine, store, seconds)
        else:
            self._dial(one_machine, store)

    def tell(self, failure: Failure) -> None:
        """Tell all peers why this rank fails; the first failure counts."""
        if self.failure is None:
            self.failure = failure
            self._send({"sentence": failure.sentence, "code": failure.code, "lost_rank": failure.lost_rank})

    def leave(self, stopped_by: int | None = None) -> None:
        """Part from the peers without a failure: at the end of the work, or stopped by a signal."""
        self._leave(stopped_by)
        self._left = True
        self._close()

    def _leave(self, stopped_by: int | None = None) -> None:
        """Say so, and wait until the peers have read it: a connection that is closed while something unread waits in it
        is reset, and the peer would lose the message.
        """
        self._leaving = True
        self._send({"leaves": True, "stopped_by": stopped_by})
        deadline = time.monotonic() + LEAVE_SECONDS
        while self._peers and time.monotonic() < deadline:
            time.sleep(0.01)

    def part(self) -> None:
        """From now on the ranks work apart: the end of one is no matter of the others. The launcher's still is."""
        self._leave()
        self._close()
        self._leaving = False

    # ---- connecting

    def _accept(self, world_size: int, one_machine: bool, store: dist.Store, seconds: float) -> None:
        token, deadline = secrets.token_hex(16), time.monotonic() + seconds
        with _server(one_machine, world_size) as server:
            store.set(KEY, json.dumps([server.getsockname()[1], token, self._own.host]))
            while len(self._peers) < world_size - 1:
                server.settimeout(max(0.1, deadline - time.monotonic()))
                try:
                    self._admit(server.accept()[0], token)
                except TimeoutError:
                    missing = sorted({*range(1, world_size)} - {peer.rank for peer in self._peers.values()})
                    raise UserError(
                        f"of {world_size} ranks, {', '.join(map(str, missing))} did not start within {seconds:.0f} s; "
                        "look at their logs."
                    ) from None

    def _admit(self, connected: socket.socket, token: str) -> None:
        connected.settimeout(None)
        connection = Connection(connected.detach())
        with contextlib.suppress(OSError, EOFError, ValueError, KeyError, TypeError):  # a stranger, a port scanner say
            if connection.poll(CONNECT_SECONDS):
                hello = json.loads(connection.recv_bytes(1 << 12))
                if hmac.compare_digest(hello["token"], token):
                    with self._lock:
                        self._peers = {**self._peers, connection: Peer(hello["rank"], hello["host"])}
                    return
        connection.close()

    def _dial(self, one_machine: bool, store: dist.Store) -> None:
        port, token, host = json.loads(store.get(KEY))
        address = ("127.0.0.1" if one_machine else os.environ["MASTER_ADDR"], port)
        try:
            connected = socket.create_connection(address, timeout=CONNECT_SECONDS)
        except OSError as error:
            raise UnreachableError(
                f"{self._own.host} cannot connect to port {port} of {host}, where rank 0 runs "
                f"({error.strerror or error}); the ranks need all ports between their machines: open the firewall."
            ) from error
        connected.settimeout(None)
        connection = Connection(connected.detach())
        connection.send_bytes(_encoded({"token": token, "rank": self._own.rank, "host": self._own.host}))
        self._peers = {connection: Peer(0, host)}

    # ---- the thread

    def _run(self) -> None:
        beat_at = time.monotonic()
        while not self._left:
            with contextlib.suppress(OSError):  # closed by the main thread just now
                for connection in wait(list(self._peers), HEARTBEAT_SECONDS):
                    assert isinstance(connection, Connection)  # as all of them
                    self._read(connection)
            if time.monotonic() - beat_at >= HEARTBEAT_SECONDS:
                beat_at = time.monotonic()
                self._beat()

    def _beat(self) -> None:
        if os.getppid() != self._parent:
            self._fail(Failure(f"the launcher of {self._own} was killed; {GO_ON}", EXIT_PEER_LOST))
        self._send({})
        for peer in list(self._peers.values()):
            # Missed ones are counted instead of seconds: after a pause of this process or machine, no peer is late.
            peer.missed += 1
            if peer.missed * HEARTBEAT_SECONDS > self._silence:
                self._lose(peer, f"{peer} has not answered for {self._silence:.0f} s (stopped, or its machine hangs)")

    def _read(self, connection: Connection) -> None:
        peer = self._peers.get(connection)
        if peer is None:
            return
        try:
            message = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            self._drop(connection)
            if not (self._left or self._leaving):
                self._lose(peer, f"{peer} died without a message (killed, or out of memory?)")
            return
        peer.missed = 0
        if "leaves" in message:
            self._drop(connection)
            if message["stopped_by"]:
                self.stopped_by = message["stopped_by"]
                self._send(message)
        elif "sentence" in message:
            self._fail(Failure(message["sentence"], message["code"], message["lost_rank"]))

    def _lose(self, peer: Peer, what: str) -> None:
        self._fail(Failure(f"{what}; {GO_ON}", EXIT_PEER_LOST, peer.rank))

    def _fail(self, failure: Failure) -> None:
        self.tell(failure)
        self._on_failure(self.failure or failure)

    # ---- connections

    def _send(self, message: dict[str, Any]) -> None:
        with self._lock:
            for connection in list(self._peers):
                with contextlib.suppress(OSError):  # the reader notices
                    connection.send_bytes(_encoded(message))

    def _drop(self, connection: Connection) -> None:
        """Close one connection. Who takes it out of the table closes it: closed twice, its number may be another
        file's by then.
        """
        with self._lock:
            was_open = connection in self._peers
            self._peers = {other: peer for other, peer in self._peers.items() if other is not connection}
        if was_open:
            connection.close()

    def _close(self) -> None:
        with self._lock:
            peers, self._peers = self._peers, {}
        for connection in peers:
            connection.close()

    def _forget_in_child(self) -> None:
        """Without the lock, which a thread of the parent may have held."""
        peers, self._peers = self._peers, {}
        for connection in peers:
            with contextlib.suppress(OSError):
                connection.close()


def _encoded(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode()


def _server(one_machine: bool, backlog: int) -> socket.socket:
    if one_machine:
        return socket.create_server(("127.0.0.1", 0), backlog=backlog)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=backlog)
