"""Uploads of files as multipart/form-data (RFC 7578)."""

import os
import shutil

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from mellmpi.files import visible
from mellmpi.frontend.fields import BadRequest
from mellmpi.frontend.http.batches.store import FileRecord, Store, new_id, private, record_of
from mellmpi.frontend.http.body import body_parts

MAX_FILE_BYTES = 200 << 20  # as at OpenAI
FORM_BYTES = 64 << 10  # of a form beside the file
MAX_NAME = 255  # characters of a file's name
GZIP = b"\x1f\x8b"


async def read_form(request: Request) -> UploadFile:
    """Return the file of an upload with the purpose "batch". Raises BadRequest."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise BadRequest("upload a file as multipart/form-data, with the fields file and purpose")
    parts = body_parts(request, MAX_FILE_BYTES + FORM_BYTES)
    parser = MultiPartParser(
        request.headers, parts, max_files=1, max_fields=8, max_part_size=FORM_BYTES
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise BadRequest(f"not multipart/form-data: {error.message}") from error
    except OSError as error:  # of the temporary file
        raise disk_problem(error) from error
    file = form.get("file")
    try:
        if not isinstance(file, UploadFile):
            raise BadRequest("the form has no file", "file")
        if form.get("purpose") != "batch":
            raise BadRequest("purpose must be batch", "purpose")
        if other := form.keys() - {"file", "purpose"}:
            raise BadRequest(f"{ascii(min(other))[1:41]} is not supported here; leave it out")
    except BadRequest:
        await form.close()
        raise
    return file


def disk_problem(error: OSError) -> BadRequest:
    """Return the error of a request that the disk of the server refuses."""
    return BadRequest(f"the disk of the server: {error.strerror}", code="disk", status=507)


def keep(store: Store, file: UploadFile, owner: str) -> FileRecord:
    """Copy an upload into the directory, and return its record. Waits for the disk.

    Raises BadRequest if the file is compressed, and OSError.
    """
    if file.file.read(len(GZIP)) == GZIP:
        raise BadRequest("the file is gzipped; upload it unpacked", "file")
    file.file.seek(0)
    file_id = new_id("file-")
    path = store.contents(file_id)
    try:
        with open(path, "wb", opener=private) as target:
            shutil.copyfileobj(file.file, target)
            target.flush()
            os.fsync(target.fileno())
        record = record_of(
            FileRecord,
            id=file_id,
            owner=owner,
            filename=visible((file.filename or "")[:MAX_NAME]),
            purpose="batch",
            num_bytes=path.stat().st_size,
        )
        store.publish(record)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return record
