"""The loops in which the parts meet: rank 0, a worker, their start and their end.

Decides nothing about requests. Commands are modules: the command line loads the one that it runs.
"""
