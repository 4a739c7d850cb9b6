"""A supervisor whose job is stand_in."""

import os
import sys

from launch import supervisor

supervisor.MODULES["teacher"] = "stand_in"
supervisor.PEER_SECONDS = 0.5
shape = {"cluster": "local", "nodes": 1, "ranks": 1, "minutes": 60, "signal_seconds": 2, "max_timeouts": 0}
given = {"environment": {"COLOUR": "red", "HOME": None}, "after": tuple(filter(None, [os.environ.get("AFTER")]))}
supervisor.Job("teacher", tuple(sys.argv[3:]), sys.argv[1], sys.argv[2], **shape, **given)()
