"""A server without workers: a real API server process, rank 0's front, and a fake model.

The model answers token by token, with printable bytes that depend on prompt and position alone,
with the tokens of a script, or with what a grammar allows.
"""

import select
import threading
import time
from dataclasses import replace

from mellmpi.config import HttpConfig
from mellmpi.protocol import (
    Cancel,
    Emit,
    ModelFiles,
    ModelLimits,
    OperatorAnswer,
    Rejected,
    StartServer,
    Submit,
    finish_reason,
)
from mellmpi.runtime.serving.front import HttpFront
from mellmpi.runtime.serving.listener import listen, url_of
from mellmpi.runtime.serving.process import ApiServer
from mellmpi.runtime.serving.settings import LIMITS, Settings
from tests.api_server.obedient import Obedient

FIRST_PRINTABLE, NUM_PRINTABLE = 35, 91  # token ids of the byte tokenizer with readable text
ANY_PORT = HttpConfig(port=0)
END = 2  # the token that ends an answer
BUSY = 999  # a request of this priority is refused for now
REFUSED = 666  # a prompt of this many tokens is refused by the scheduler


def token_at(request, index: int) -> int:
    """The token at this index of the answer."""
    seed = request.sampling.seed if request.sampling.temperature else 0
    return FIRST_PRINTABLE + (sum(request.prompt) * 31 + index * 17 + seed) % NUM_PRINTABLE


class OneAtATime:
    """A front that tests call beside the thread of the model: one call at a time."""

    def __init__(self, front):
        vars(self).update(_front=front, _lock=threading.RLock())

    def __setattr__(self, name, value):
        setattr(self._front, name, value)

    def __getattr__(self, name):
        value = getattr(self._front, name)
        if not callable(value):
            return value

        def call(*arguments, **named):
            with self._lock:
                return value(*arguments, **named)

        return call


class ServingCell:
    """Use as a context manager; `url` is the server's."""

    def __init__(
        self,
        directory,
        token_s=0.0,
        tokens_a_step=1,
        max_model_len=100_000,
        config=ANY_PORT,
        limits=LIMITS,
        template="",
        other_models=None,
        answer_len=None,
    ):
        """
        other_models  directory of each further model, by name
        answer_len    tokens after which an answer ends by itself; None: after `max_tokens` only
        """
        self.answer_len = answer_len
        self.token_s, self.tokens_a_step = token_s, tokens_a_step
        settings = Settings(config, limits)
        listener = listen(config)
        self.url = url_of(listener, config)
        server = ApiServer(listener, 0, settings.message)
        self.front = OneAtATime(HttpFront(listener, [server], settings))
        self.front.questions = {"load": lambda: '{"server_load": 0}', "progress": lambda **_: "ok"}
        models = {"tiny": directory, **(other_models or {})}
        templates = {"tiny": str(template)}
        files = [
            ModelFiles(name, str(path), templates.get(name, "")) for name, path in models.items()
        ]
        self.front.start(StartServer(tuple(files), 0, 1))
        limits = tuple(ModelLimits(name, max_model_len, 512, (END,)) for name in models)
        self.front.set_state("ready", "", limits)
        self.obedient = Obedient(models)
        self.scripts = {}  # seed of a request -> tokens of its answer
        self.requests = []
        self.open, self.cancelled, self.submitted = {}, [], 0
        self.hold = threading.Event()  # set: the model pauses
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stopped.set()
        self._thread.join()
        self.front.close()

    @property
    def server(self) -> ApiServer:
        return self.front._servers[0]

    def _run(self):
        while not self._stopped.is_set():
            busy = bool(self.open) and not self.hold.is_set()
            wait_s = self.token_s if busy else 0.02
            if self.front.descriptors and wait_s:
                select.select(self.front.descriptors, [], [], wait_s)
            for event in self.front.inbox(time.perf_counter()):
                self._handle(event)
            if not self.hold.is_set():
                self._step()
            self.front.flush()

    def _handle(self, event):
        match event:
            case Submit(request) if len(request.prompt) == REFUSED:
                self.front.deliver(Rejected(request.id, "it needs more than there is", 0.0))
            case Submit(request) if request.priority == BUSY:
                self.front.deliver(Rejected(request.id, "its first token would come late", 2.4))
            case Submit(request):
                self.submitted += 1
                self.requests.append(request)
                self.open[request.id] = (request, [])
            case Cancel(request_id, reason):
                self.open.pop(request_id, None)
                self.cancelled.append((request_id, reason))
            case _:
                self.front.deliver(OperatorAnswer(event, ""))

    def _token(self, request, outputs):
        index, script = len(outputs), self.scripts.get(request.sampling.seed)
        if script is not None:
            return script[index] if index < len(script) else END
        if request.sampling.grammar:
            token = self.obedient.token(request, outputs, index >= (self.answer_len or 0))
            return END if token is None else token
        return END if index == self.answer_len else token_at(request, index)

    def _step(self):
        for request_id, (request, outputs) in list(self.open.items()):
            first = len(outputs)
            while (reason := finish_reason(request, outputs)) is None:
                if len(outputs) - first == self.tokens_a_step:
                    break
                outputs.append(self._token(request, outputs))
            new = tuple(outputs[first:])
            logprobs = ()
            if request.sampling.num_logprobs is not None:
                logprobs = tuple((-0.5, (token,), (-0.5,)) for token in new)
            scored = ()
            if request.sampling.num_prompt_logprobs is not None and not first:
                scored = tuple(((-0.25, (token,), (-0.25,)), 1) for token in request.prompt[1:])
            self.front.deliver(Emit(request_id, first, new, logprobs, reason, scored))
            if reason:
                del self.open[request_id]


def expected_text(tokenizer, prompt, num_tokens, **sampling):
    """The text of the answer that the model gives to a completion."""
    from mellmpi.protocol import GREEDY, Request

    request = Request(0, "tiny", tuple(prompt), replace(GREEDY, **sampling), None, 0, None)
    return tokenizer.decode([token_at(request, index) for index in range(num_tokens)])
