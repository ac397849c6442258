"""Who observes a run: takes every event and command of rank 0, and decides nothing."""

from typing import Any, Protocol

from mellmpi.protocol import Address


class Observer(Protocol):
    """`observe` an event, then the commands that follow from it; `now` never decreases."""

    def observe(self, now: float, source: Address, event: Any) -> None: ...
    def commands(self, now: float, commands: list[tuple[Address, Any]]) -> None: ...


class Observers:
    """Several observers as one."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def observe(self, now: float, source: Address, event: Any) -> None:
        for observer in self._observers:
            observer.observe(now, source, event)

    def commands(self, now: float, commands: list[tuple[Address, Any]]) -> None:
        for observer in self._observers:
            observer.commands(now, commands)
