"""The console command ``orphan-recovery``.

It stands outside the package because importing the package reads the configuration: a bad value
is to be one clear line and exit code 2 here, not a traceback.
"""

import sys


def main() -> None:
    """Run the command line; exits with 2 where the configuration cannot be used."""
    try:
        from orphan_recovery.cli.main import main as run
    except ValueError as error:
        if type(error).__name__ != "ConfigurationError":
            raise
        sys.stderr.write(f"orphan-recovery: {error}\n")
        sys.exit(2)
    run()
