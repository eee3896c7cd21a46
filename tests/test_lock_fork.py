"""Lock evidence: a child that outlives its worker keeps no lock of it, whenever it was forked."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine

from lock_support import KINDS, await_locks, with_locks
from orphan_recovery.alive.lock import Locks
from support import Database


@pytest.fixture
def fork_once() -> Iterator["Fork"]:
    fork = Fork()
    yield fork
    fork.end()


class Fork:
    """A child that lives on, with all that this process had open when it was forked."""

    child = 0

    def __init__(self) -> None:
        self._reading, self._writing = os.pipe()

    def begin(self, *_: object) -> None:
        if self.child:
            return
        self.child = os.fork()
        if self.child == 0:
            os.close(self._writing)
            os.read(self._reading, 1)  # until the parent closes its end
            os._exit(0)

    def end(self) -> None:
        os.close(self._writing)
        os.close(self._reading)
        if self.child:
            os.waitpid(self.child, 0)


@KINDS
async def test_a_child_forked_while_the_connection_was_opened_keeps_no_lock(
    db: Database,
    engine: AsyncEngine,
    fork_once: Fork,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """It could not know of the connection by then: the worker takes another one."""
    target = with_locks(tmp_path, monkeypatch, kind)
    db.add_run("run")
    event.listen(engine.sync_engine, "connect", fork_once.begin)
    locks = Locks(target, target.beat)
    told = await locks.prove(engine, [("run", "worker-1")])
    assert (bool(told.thresholds), bool(fork_once.child)) == (True, True)
    await_locks(db, 1)
    assert locks._socket is not None
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, locks._socket)  # its end of the connection closes as if it had died
    os.close(nothing)
    await_locks(db, 0, 10)
    await locks.let_go()
