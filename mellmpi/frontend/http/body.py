"""Bodies of requests."""

from collections.abc import AsyncGenerator

from starlette.requests import Request

from mellmpi.frontend.fields import BadRequest

MAX_BODY_BYTES = 32 << 20


async def read_body(request: Request, most: int = MAX_BODY_BYTES) -> bytes:
    """Return the body of a request. Raises BadRequest if it has more than `most` bytes."""
    return b"".join([part async for part in body_parts(request, most)])


async def body_parts(request: Request, most: int) -> AsyncGenerator[bytes]:
    """Yield the body of a request as it arrives. Raises BadRequest as `read_body` does."""
    too_long = BadRequest(f"the body is longer than {most} bytes", code="too_large", status=413)
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > most:
        raise too_long
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise too_long
        yield part
