"""API keys: the file that lists them, the hashes it holds, scopes.

A line of the file has three or four fields between blanks: name, SHA-256 of the key in hexadecimal,
scopes joined by commas, most requests in progress at once. `#` begins a comment.
"""

import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterable
from pathlib import Path

from mellmpi.config import UsageError
from mellmpi.protocol import ApiKey

SERVE, OPERATE, METRICS = "serve", "operate", "metrics"
SCOPES = {
    SERVE: "models, answers, tokens, files, batches",
    OPERATE: "drain, migrate, log levels",
    METRICS: "metrics, load, the state of workers",
}
PREFIX = "mell-"  # of a key, for scanners of leaked secrets
SECRET_BYTES = 32  # so many random bytes cannot be guessed, and need no slow hash
NAME = "[A-Za-z0-9._@-]{1,64}"
GIVEN = "api-key-"  # names of the keys on the command line begin so
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def new_key() -> str:
    """Return a new random key."""
    return PREFIX + secrets.token_urlsafe(SECRET_BYTES)


def digest(key: str) -> bytes:
    """Return the hash that the file holds of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def line_of(name: str, key: str, scopes: Iterable[str], max_concurrency: int = 0) -> str:
    """Return the line for a key. Raises UsageError if the name or a scope is wrong."""
    limit = [str(max_concurrency)] if max_concurrency else []
    line = " ".join([name, digest(key).hex(), ",".join(scopes), *limit])
    try:
        _parsed(line)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return line


def given_keys(keys: Iterable[str]) -> tuple[ApiKey, ...]:
    """Return the keys of the command line; each has all scopes. Raises UsageError."""
    found = []
    for number, key in enumerate(keys, 1):
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise UsageError(
                "--api-key must be printable ASCII without blanks; python -m mellmpi key NAME "
                "makes one"
            )
        found.append(ApiKey(f"{GIVEN}{number}", digest(key), tuple(SCOPES), 0))
    return tuple(found)


def read_keys(name: str) -> tuple[ApiKey, ...]:
    """Return the keys of a file. Raises UsageError that says what to correct."""
    flag = f"--api-key-file {name}"
    try:
        with Path(name).open(encoding="utf-8") as file:
            _check_owner(os.fstat(file.fileno()), flag, name)
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"{flag} cannot be read: {why}") from error
    keys: dict[str, ApiKey] = {}
    for number, line in enumerate(lines, 1):
        if not (text := line.partition("#")[0].strip()):
            continue
        try:
            key = _parsed(text)
            if key.name in keys:
                raise ValueError(f"the name {key.name} occurs twice")
        except ValueError as error:
            raise UsageError(f"{flag}, line {number}: {error}") from error
        keys[key.name] = key
    if not keys:
        raise UsageError(f"{flag} has no key; add a line that python -m mellmpi key NAME prints")
    return tuple(keys.values())


def _check_owner(status: os.stat_result, flag: str, name: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{flag} is no regular file")
    if status.st_mode & OTHERS_WRITE:
        raise UsageError(f"{flag}: other users can write to it; type  chmod go-w {name}")
    if status.st_uid not in (0, os.geteuid()):
        raise UsageError(f"{flag} belongs to another user, who could add keys to it")


def _parsed(text: str) -> ApiKey:
    """Return the key of a line. Raises ValueError that does not repeat the hash."""
    fields = text.split()
    if len(fields) not in (3, 4):
        raise ValueError("a line has a name, a hash, scopes, and perhaps a number of requests")
    name, hashed, scopes = fields[:3]
    if not re.fullmatch(NAME, name) or name.startswith(GIVEN):
        raise ValueError(
            f"a name has at most 64 of the characters A-Z a-z 0-9 . _ @ - and does not begin "
            f"with {GIVEN}"
        )
    if not re.fullmatch("[0-9a-fA-F]{64}", hashed):
        raise ValueError(
            f"the hash of {name} must be the 64 hexadecimal digits of SHA-256, not a key"
        )
    given = tuple(dict.fromkeys(scopes.split(",")))
    if not set(given) <= SCOPES.keys():
        raise ValueError(f"the scopes of {name} must be among {', '.join(SCOPES)}")
    limit = fields[3] if len(fields) == 4 else "0"
    if not re.fullmatch("[0-9]{1,6}", limit):
        raise ValueError(f"the limit of {name} must be a number of requests")
    return ApiKey(name, bytes.fromhex(hashed), given, int(limit))
