"""Reads the command line, the environment and the YAML file into one Config, and runs a command.

The only room that reads the user's environment. Knows no MPI and no torch: a command is loaded
when it runs.
"""

from mellmpi.cli.parser import main

__all__ = [
    "main",
]
