"""The command line, the environment and the YAML file, made into one Config.

The only room that reads the user's environment. Knows no MPI and no torch: commands are loaded
when they run.
"""

from mellmpi.cli.parser import main

__all__ = [
    "main",
]
