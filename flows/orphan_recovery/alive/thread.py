"""Thread: a call in a thread of its own, at once, whatever else the process is busy with.

The hazard is to wait in a queue: the threads that an event loop keeps for calls that block are
the work's, which may need all of them for minutes; and they take nothing any more once the main
thread has ended, while others still report what they have done.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def in_own_thread(call: Callable[[], T]) -> "Future[T]":
    """Do ``call`` in a thread of its own; in this one where no further one can be started."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # from here on nobody can take it back

    def work() -> None:
        try:
            result = call()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    try:
        threading.Thread(target=work, name="orphan-recovery call", daemon=True).start()
    except RuntimeError:
        work()
    return future


class OwnThreads(ThreadPoolExecutor):
    """For the beater's loop, which looks up the names of hosts by it."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> "Future[T]":
        return in_own_thread(lambda: fn(*args, **kwargs))
