"""The file of API keys, and the rules of a server's start."""

import os
import subprocess
import sys
from hashlib import sha256

import pytest

from mellmpi.cli.parser import main
from mellmpi.config import HttpConfig, UsageError
from mellmpi.keys import digest, given_keys, line_of, new_key, read_keys
from mellmpi.runtime.serving.listener import listen
from mellmpi.runtime.serving.settings import Settings

HASH = sha256(b"secret").hexdigest()


@pytest.fixture
def key_file(tmp_path):
    def write(text, mode=0o600):
        path = tmp_path / "keys"
        path.write_text(text)
        path.chmod(mode)
        return str(path)

    return write


def test_a_new_key_and_its_line_belong_together(key_file):
    key = new_key()
    assert key != new_key() and len(key) > 40
    name = key_file("# name hash scopes\n" + line_of("alice", key, ["serve", "metrics"], 4) + "\n")
    (read,) = read_keys(name)
    assert (read.name, read.sha256) == ("alice", digest(key))
    assert (read.scopes, read.max_concurrency) == (("serve", "metrics"), 4)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no key"),
        ("# nothing\n\n", "has no key"),
        (f"a {HASH}", "line 1: a line has"),
        (f"a {HASH} serve 1 2", "line 1: a line has"),
        ("a secret serve", "line 1: the hash of a must be"),
        (f"\na {HASH} root", "line 2: the scopes of a"),
        (f"a {HASH} serve,", "line 1: the scopes of a"),
        (f"a/b {HASH} serve", "line 1: a name has"),
        (f"api-key-1 {HASH} serve", "line 1: a name has"),
        (f"a {HASH} serve -1", "line 1: the limit of a"),
        (f"a {HASH} serve\na {HASH} serve", "line 2: the name a occurs twice"),
    ],
)
def test_errors_of_the_file_name_the_line_and_never_the_key(key_file, text, says):
    with pytest.raises(UsageError) as raised:
        read_keys(key_file(text))
    message = str(raised.value)
    assert says in message and "\n" not in message
    assert "secret" not in message and HASH not in message


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_file_that_others_can_write_to_is_refused(key_file, mode):
    with pytest.raises(UsageError, match="chmod go-w"):
        read_keys(key_file(f"a {HASH} serve", mode))


def test_a_file_of_another_user_is_refused(key_file, monkeypatch):
    name = key_file(f"a {HASH} serve")
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(name).st_uid + 1)
    if os.stat(name).st_uid:
        with pytest.raises(UsageError, match="belongs to another user"):
            read_keys(name)


@pytest.mark.parametrize("name", ["missing", "."])
def test_a_file_that_cannot_be_read_is_refused(tmp_path, name):
    with pytest.raises(UsageError, match=r"cannot be read|is no regular file"):
        read_keys(str(tmp_path / name))


@pytest.mark.parametrize("key", ["", "a b", "ä", "a\n"])
def test_keys_that_no_header_can_carry_are_refused(key):
    with pytest.raises(UsageError, match="--api-key must be"):
        given_keys([key])


def test_the_command_prints_a_key_and_its_line(capsys, key_file):
    assert main(["key", "bob", "--scope", "operate", "--max-concurrency", "2"]) == 0
    key, line = capsys.readouterr().out.splitlines()
    (read,) = read_keys(key_file(line))
    assert (read.name, read.sha256, read.scopes) == ("bob", digest(key), ("operate",))
    assert main(["key", "b/b"]) == 2
    assert "a name has" in capsys.readouterr().err


def test_keys_do_not_show_in_the_text_of_a_configuration():
    assert "secret" not in repr(HttpConfig(api_key=["secret"]))


# --- start ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_others_reach_a_server_only_with_a_key_or_if_told(host, key_file):
    with pytest.raises(UsageError, match=r"--api-key-file.*--allow-unauthenticated"):
        listen(HttpConfig(host=host, port=0))
    name = key_file(f"a {HASH} serve")
    for more in ({"api_key": ["x"]}, {"api_key_file": name}, {"allow_unauthenticated": True}):
        listen(HttpConfig(host="0.0.0.0", port=0, **more)).close()
    listen(HttpConfig(host="localhost", port=0)).close()


def certificate(directory, name):
    """Make a certificate; its path and that of its key."""
    cert, key = directory / f"{name}.pem", directory / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "30", "-subj", f"/CN={name}", "-keyout", str(key)]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    return str(cert), str(key)


def test_certificates_are_checked_at_the_start(tmp_path):
    cert, key = certificate(tmp_path, "one")
    _, other = certificate(tmp_path, "two")
    Settings(HttpConfig(ssl_certfile=cert, ssl_keyfile=key))
    for given, says in (
        ({"ssl_keyfile": key}, "goes with --ssl-certfile"),
        ({"ssl_certfile": cert, "ssl_keyfile": other}, "mismatch"),
        ({"ssl_certfile": cert}, "--ssl-certfile"),
        ({"ssl_certfile": sys.executable}, "no PEM file"),
        ({"ssl_certfile": "missing.pem"}, "No such file"),
    ):
        with pytest.raises(UsageError, match=says):
            Settings(HttpConfig(**given))


def test_the_access_log_is_proved_writable(tmp_path):
    with pytest.raises(UsageError, match="--access-log"):
        Settings(HttpConfig(access_log=str(tmp_path / "no" / "log")))


def test_files_are_read_again_and_errors_change_nothing(key_file):
    name = key_file(f"a {HASH} serve")
    settings = Settings(HttpConfig(api_key_file=name))
    assert not settings.changed()
    key_file(f"b {HASH} serve\n")
    assert settings.changed() and [key.name for key in settings.message.keys] == ["b"]
    key_file("nonsense")
    assert not settings.changed() and not settings.changed()
    assert [key.name for key in settings.message.keys] == ["b"]
    os.unlink(name)
    assert not settings.changed() and settings.message.keys
