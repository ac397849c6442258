"""Settings of API servers, read again when their files change."""

import fcntl
import ipaddress
import logging
import os
import ssl
import tempfile
from pathlib import Path

from mellmpi.config import HttpConfig, UsageError
from mellmpi.keys import given_keys, read_keys
from mellmpi.protocol import ServerLimits, ServerSettings

log = logging.getLogger(__name__)

LIMITS = ServerLimits(
    max_connections=8192,
    head_within_s=20.0,
    body_within_s=60.0,
    read_within_s=60.0,
    parse_within_s=10.0,
)
Signature = tuple[tuple[int, int, int] | None, ...]


class Settings:
    """The `ServerSettings` of a configuration. Raises UsageError if a file is wrong."""

    def __init__(self, config: HttpConfig, limits: ServerLimits = LIMITS):
        self._config, self._limits = config, limits
        names = (config.api_key_file, config.ssl_certfile, config.ssl_keyfile)
        self._files = [name for name in names if name]
        self._seen = self._signature()
        _check_log(config.access_log)
        _check_batch_dir(config.batch_dir)
        self.message = self._read()

    def changed(self) -> bool:
        """Read the files again if one has changed. Returns whether `message` is new.

        Files with an error change nothing but the log: the settings stay as they are.
        """
        if (found := self._signature()) == self._seen:
            return False
        self._seen = found
        try:
            message = self._read()
        except UsageError as error:
            log.warning("the settings stay as they are: %s", error)
            return False
        self.message = message
        log.warning("read again: %s", ", ".join(self._files))
        return True

    def _signature(self) -> Signature:
        return tuple(map(_signature, self._files))

    def _read(self) -> ServerSettings:
        config = self._config
        listed = read_keys(config.api_key_file) if config.api_key_file else ()
        check_certificate(config)
        return ServerSettings(
            keys=(*given_keys(config.api_key), *listed),
            certfile=os.path.abspath(config.ssl_certfile) if config.ssl_certfile else "",
            keyfile=os.path.abspath(config.ssl_keyfile) if config.ssl_keyfile else "",
            allowed_origins=tuple(config.allowed_origins),
            access_log=_absolute(config.access_log),
            limits=self._limits,
            batch_dir=_absolute(config.batch_dir),
        )


def check_open(config: HttpConfig, address: str) -> None:
    """Raise UsageError if anybody in the network could use a server at this address.

    address  numeric; "": all addresses of this machine
    """
    if config.api_key or config.api_key_file or config.allow_unauthenticated:
        return
    if not address or not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        raise UsageError(
            f"at --host {config.host} everybody in the network could use this server: give "
            "--api-key-file FILE (python -m mellmpi key NAME makes a key), or "
            "--allow-unauthenticated if that is intended"
        )


def check_certificate(config: HttpConfig) -> None:
    """Raise UsageError if certificate and private key cannot be used."""
    if not config.ssl_certfile:
        if config.ssl_keyfile:
            raise UsageError("--ssl-keyfile goes with --ssl-certfile CERTIFICATE.pem")
        return
    flags = f"--ssl-certfile {config.ssl_certfile}"
    flags += f" --ssl-keyfile {config.ssl_keyfile}" if config.ssl_keyfile else ""
    try:
        # The password of an encrypted key would be asked for on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            config.ssl_certfile, config.ssl_keyfile, password=""
        )
    except ssl.SSLError as error:
        why = (error.reason or "").lower().replace("_", " ")
        why = why or "it is no PEM file, or its private key has a password"
        raise UsageError(f"{flags}: {why}") from error
    except OSError as error:
        raise UsageError(f"{flags}: {error.strerror}") from error


def _check_log(name: str | None) -> None:
    if name and name != "-":
        try:
            with Path(name).open("ab"):
                pass
        except OSError as error:
            raise UsageError(f"--access-log {name}: {error.strerror}") from error


def _check_batch_dir(name: str | None) -> None:
    """Make the directory. Raises UsageError if it cannot hold batches."""
    if not name:
        return
    try:
        os.makedirs(name, mode=0o700, exist_ok=True)
        with tempfile.TemporaryFile(dir=name) as trial:
            fcntl.flock(trial, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UsageError(f"--batch-dir {name}: {error.strerror}") from error


def _absolute(name: str | None) -> str:
    return os.path.abspath(name) if name and name != "-" else name or ""


def _signature(name: str) -> tuple[int, int, int] | None:
    """Return what changes with a file; None if there is none."""
    try:
        status = os.stat(name)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
