"""The main loops of rank 0 and of a worker, with their start and end.

Makes no decisions about requests. Each command is a module: the command line loads only the one
that it runs.
"""
