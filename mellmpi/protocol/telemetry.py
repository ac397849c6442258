"""What rank 0 tells metrics and the timeline. Never on the wire."""

from mellmpi.protocol.wire import message


@message
class MigrationStarted:
    """A placed request begins to move."""

    request_id: int
    mode: str  # "transfer", "recompute" or "split"
    src: int
    dst: int
    reason: str  # of the policy: "overflow", "drain", "stress" …
    start: int  # positions before it are computed by the destination
    num_bytes: int  # expected over the link
    predicted_s: float  # until its end, as rank 0 will see it
    predicted_downtime_s: float  # without a token


@message
class MigrationEnded:
    """It has moved, or stays where it was."""

    request_id: int
    mode: str
    src: int
    dst: int
    num_bytes: int  # that came over the link
    transfer_s: float  # from header to last block; 0 for recompute
    outcome: str  # "moved", or why not: "refused", "failed: checksum", "preempted" …


@message
class WorkerChanged:
    """A worker has entered this state."""

    worker: int
    state: str  # "starting", "active", "draining", "parking", "parked", "waking", "lost"


@message
class Preempted:
    """A request lost its blocks and waits again."""

    request_id: int
    worker: int
