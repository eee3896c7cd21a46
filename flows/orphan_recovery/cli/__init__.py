"""The command line: its commands, the options that several of them have, and its one table."""
