"""Commands of an operator, and the scheduler's answer to each of them."""

from mellmpi.protocol.wire import message


@message
class DrainWorker:
    """Front → scheduler: hold this worker. It takes nothing, its requests move away, it parks."""

    worker: int


@message
class UndrainWorker:
    """Front → scheduler: let this held worker take requests again."""

    worker: int


@message
class MoveRequest:
    """Front → scheduler: move this request to a worker, in the mode that costs least."""

    request_id: int
    worker: int


@message
class OperatorAnswer:
    """Scheduler → front: the command is being carried out, or has changed nothing.

    Answers come in the order of the commands.
    """

    asked: DrainWorker | UndrainWorker | MoveRequest
    error: str  # why nothing was changed, one line; "" if it is being carried out
