"""The command line, in the order in which it is met: its commands, their options, its one table."""
