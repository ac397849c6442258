"""A batch job over lines in memory, and views of its output."""

import json

from mellmpi.files import LineReader
from mellmpi.frontend import BatchJob, ServedModels
from mellmpi.protocol import Emit


def entry(custom_id="a", url="/v1/completions", method="POST", **body):
    return {"custom_id": custom_id, "method": method, "url": url, "body": {"prompt": "hi", **body}}


def text_of(entries) -> bytes:
    return b"".join(e if isinstance(e, bytes) else json.dumps(e).encode() + b"\n" for e in entries)


class Run:
    """A job over lines in memory. The model answers with the reversed prompt."""

    def __init__(self, tokenizer, model, entries, **options):
        pieces = [text_of(entries), b""]
        self.written, self.shown = b"", []
        reader = LineReader(lambda: pieces.pop(0))
        self.job = BatchJob(
            reader,
            self.write,
            ServedModels.of((model, tokenizer)),
            on_answer=self.shown.append,
            now=lambda: 7.5,
            **options,
        )
        self.tokenizer = tokenizer

    def write(self, data: bytes) -> None:
        assert data.endswith(b"\n") and data.count(b"\n") == 1  # one complete line per call
        self.written += data

    @property
    def lines(self):
        return [json.loads(line) for line in self.written.decode().splitlines()]

    def answer(self, request, finish="length"):
        tokens = request.prompt[::-1][: request.sampling.max_tokens]
        for index, token in enumerate(tokens[:-1]):
            if self.job.emit(Emit(request.id, index, (token,), (), None, ())):
                return
        self.job.emit(Emit(request.id, len(tokens) - 1, tokens[-1:], (), finish, ()))

    def run(self):
        for request in self.job.requests():
            self.answer(request)
        assert self.job.done
        return self.lines


def texts(lines):
    return {
        line["custom_id"]: [c["text"] for c in line["response"]["body"]["choices"]]
        for line in lines
        if line["error"] is None
    }


def errors(lines):
    return [(line["custom_id"], line["error"]["message"]) for line in lines if line["error"]]
