"""The ending: what Ctrl-C, a closed terminal and a kill mean to the demo.

The hazard is an end in the middle of a step that starts or stops something, which then stays. So
such steps are finished first, and the first signal is the only one that counts.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final, Self

ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Ending:
    """Within it, the first signal that asks for an end raises KeyboardInterrupt, and no other does.

    A signal that was ignored before (nohup, a shell's background) stays so.
    """

    def __enter__(self) -> Self:
        handlers = {which: signal.getsignal(which) for which in ENDING}
        self._before = {w: handler for w, handler in handlers.items() if handler != signal.SIG_IGN}
        self._is_held_back = self._is_asked_for = False
        for which in self._before:
            signal.signal(which, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for which, handler in self._before.items():
            signal.signal(which, handler)

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """A step that is finished before any signal counts."""
        self._is_held_back = True
        try:
            yield
        finally:
            self._is_held_back = False
            if self._is_asked_for:
                raise KeyboardInterrupt

    @contextmanager
    def undisturbed_after(self) -> Iterator[None]:
        """What comes after it is finished, whoever presses Ctrl-C."""
        try:
            yield
        finally:
            self._is_asked_for = True

    def _ask(self, _number: int, _frame: FrameType | None) -> Any:
        if self._is_asked_for:
            return
        self._is_asked_for = True
        if not self._is_held_back:
            raise KeyboardInterrupt
