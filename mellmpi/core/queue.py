"""The one queue of requests that are on no worker."""

from collections import OrderedDict

from mellmpi.core.requests import Record


class WaitingQueue:
    """First come, first placed; who was placed before and lost its place comes first again."""

    def __init__(self) -> None:
        self._records: OrderedDict[int, tuple[Record, int]] = OrderedDict()
        self.kv_bytes = 0  # what all of them need to be placed

    def __len__(self) -> int:
        return len(self._records)

    def head(self) -> Record:
        return next(iter(self._records.values()))[0]

    def append(self, record: Record, kv_bytes: int) -> None:
        self._records[record.request.id] = record, kv_bytes
        self.kv_bytes += kv_bytes

    def prepend(self, record: Record, kv_bytes: int) -> None:
        self.append(record, kv_bytes)
        self._records.move_to_end(record.request.id, last=False)

    def remove(self, record: Record) -> None:
        """Take it out, if it is here."""
        _, kv_bytes = self._records.pop(record.request.id, (record, 0))
        self.kv_bytes -= kv_bytes
