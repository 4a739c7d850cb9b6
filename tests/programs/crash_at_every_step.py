"""Publish a cache, and die at each step of it in turn."""

import hashlib
import os
import shutil
import sys
from pathlib import Path

import h5py
from test_cache_format import HEADER, put_all, shards_of, tables_of

from kd_dist.cache import BlockWriter, CachePlan, open_cache
from kd_dist.errors import UserError


def dying(real, calls):
    """The function, and the end of the process once the calls are used up."""

    def call(*arguments, **options):
        if next(calls, None) is None:
            os._exit(9)
        return real(*arguments, **options)

    return call


target = Path(sys.argv[1])
os.fsync = lambda descriptor: None  # slow, and of no use against a kill
tables = tables_of()
prepared = target.parent.with_name("prepared")
first = BlockWriter(prepared / target.name, CachePlan(HEADER, tables))
put_all(first, first.missing())
for step in range(100):
    shutil.rmtree(target.parent, ignore_errors=True)
    shutil.copytree(prepared, target.parent)
    writer = BlockWriter(target, CachePlan(HEADER, tables))
    child = os.fork()
    if child == 0:
        calls = iter(range(step))
        of_os = [(os, name) for name in ("replace", "fsync", "posix_fallocate", "pwrite")]
        steps = [*of_os, (shutil, "rmtree"), (h5py, "File")]
        for module, name in steps:
            setattr(module, name, dying(getattr(module, name), calls))
        writer.publish()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9), status
    try:
        views = open_cache(target).views
    except UserError as error:
        assert not target.exists(), error
        views = 0
    if shards_of(target).exists():
        again = BlockWriter(target, CachePlan(HEADER, tables))
        assert again.missing() == []
        again.publish()
    print(step, status, views, hashlib.sha256(target.read_bytes()).hexdigest(), open_cache(target).digest)
    if status == 0:
        break
