"""How a run stands: state.json, one small document that is replaced whole."""

from __future__ import annotations

import json
import os
import socket
from datetime import UTC, datetime
from typing import Any

from kd_dist.errors import UserError
from kd_dist.files import write_json
from kd_dist.run.folder import RunFolder

STATUSES = ("running", "finished", "interrupted", "failed")


def write_state(folder: RunFolder, status: str, **facts: Any) -> None:
    """Note how the run stands: `status` is one of STATUSES, `facts` such as step=, epoch=, message=, code= (an
    events.Reason).

    time (UTC, ISO 8601), pid and host are added, so a reader can tell a silent run from a living one. Raises UserError
    when the disk is full: a caller that notes a failure suppresses it, to let the first failure be the one told.
    """
    if status not in STATUSES:
        raise ValueError(f"status {status!r} is none of {STATUSES}")
    now = datetime.now(UTC).isoformat(timespec="microseconds")
    write_json(folder.state, {"status": status, **facts, "time": now, "pid": os.getpid(), "host": socket.gethostname()})


def read_state(folder: RunFolder) -> dict[str, Any] | None:
    """What `write_state` noted last, None where it never did."""
    try:
        return json.loads(folder.state.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder.state} cannot be read ({error}).") from error
