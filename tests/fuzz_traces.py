"""Fuzz test of the trace reader: python -m tests.fuzz_traces 100000 reads 100000 damaged traces."""

import gzip
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

from mellmpi.workload import load

VALID = tuple(
    text.encode()
    for text in (
        "arrival_s,prompt_tokens,output_tokens,model\n0.5,10,20,a\n\n1.5,1,2,b\n",
        "TIMESTAMP;ContextTokens;GeneratedTokens\r\n2023-11-16 18:17:03.9799600;10;20\r\n"
        "2024-05-10T00:00:00Z;1;2\r\n",
        "Timestamp\tSession ID\tModel\tRequest tokens\tResponse tokens\n1.0\ts\tm\t7\t0\n"
        '2\t\t"n"\t1\t2\n',
        '{"timestamp": 0, "input_length": 10, "output_length": 20, "hash_ids": [1]}\n'
        '{"timestamp": 250, "input_length": 1, "output_length": 2, "hash_ids": []}\n',
        '{"chat_id": 1, "timestamp": 0.5, "input_length": 10, "output_length": 20}\n',
    )
)
PIECES = (
    *(bytes([byte]) for byte in b'\0\r\n\t,;"{}[]:-. 0\xff\xe9'),
    b"",
    b"\n\n",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\x1f\x8b",
    b"nan",
    b"inf",
    b"1e400",
    b"-1",
    b"0x10",
    b"1_000",
    b"true",
    b"null",
    b"NaN",
    b"9" * 30,
    b"9" * 5000,
    b"[" * 5000,
    b"2147483648",
    b"\\ud800",
    "１".encode(),
    b"2024-02-30 00:00:00+25:00",
    b'"timestamp"',
    b"TIMESTAMP",
)


def damaged(rng: random.Random, valid: bytes) -> bytes:
    """Return a trace with up to four pieces removed, doubled or replaced; some gzipped or cut."""
    data = valid
    for _ in range(rng.randint(0, 4)):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice((0, 0, 1, 1, 4, 40)))
        piece = rng.choice((*PIECES, data[start:end] * 2, rng.randbytes(3)))
        data = data[:start] + piece + data[end:]
    if rng.random() < 0.1:
        data = gzip.compress(data)
        if rng.random() < 0.5:
            data = data[: rng.randrange(len(data))]
    return data


def outcome(path: Path, data: bytes) -> str:
    """Return "read" or "refused". Raises on any other error, or one without the file's name."""
    path.write_bytes(data)
    try:
        found = load(path)
    except ValueError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error), str(error)
        return "refused"
    assert found.arrival_s[0] >= 0 and (found.arrival_s[1:] >= found.arrival_s[:-1]).all()
    for tokens in (found.prompt_tokens, found.output_tokens):
        assert ((tokens >= 1) & (tokens < 2**31)).all()
    assert found.source.startswith(str(path)) and "\n" not in found.source
    return "read"


def main(count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, counts = Path(folder) / "trace", Counter()
        for seed in range(count):
            rng = random.Random(seed)
            data = damaged(rng, rng.choice(VALID))
            try:
                counts[outcome(path, data)] += 1
            except BaseException:
                print(f"seed {seed}: {data[:500]!r}")
                raise
    print(f"{count} damaged traces: {dict(counts)}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
