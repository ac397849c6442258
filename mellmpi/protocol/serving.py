"""Messages between rank 0 and its API servers, the child processes that speak HTTP.

`Submit`, `Cancel`, `Emit` and `Rejected` cross the same pipe unchanged.
"""

from mellmpi.protocol.wire import message


@message
class ModelFiles:
    """Where an API server finds the tokenizer of a model."""

    name: str
    directory: str
    chat_template: str  # a file that replaces the template of the model; empty: none does


@message
class ApiKey:
    """Who may use the server, and for what."""

    name: str  # the owner of the calls made with it
    sha256: bytes  # of the key in UTF-8
    scopes: tuple[str, ...]  # "serve", "operate", "metrics"
    max_concurrency: int  # requests in progress in one API server; 0: no limit


@message
class ServerLimits:
    """What clients may take. Seconds."""

    max_connections: int
    head_within_s: float  # from the first byte of a request, or a new connection
    body_within_s: float
    read_within_s: float  # in which a client must read something that waits for it
    parse_within_s: float  # for checking, rendering and tokenizing one body


@message
class ServerSettings:
    """Rank 0 → API server, first message, and again when a file of settings has changed.

    An API server accepts no connection before. The pipe carries what `ps` must not show.
    """

    keys: tuple[ApiKey, ...]  # empty: every request is allowed
    certfile: str  # TLS certificate, PEM; empty: no TLS
    keyfile: str  # its private key; empty: in the certificate's file
    allowed_origins: tuple[str, ...]  # of web pages whose scripts may call (CORS); "*": all
    access_log: str  # file; "-": standard error; empty: none
    limits: ServerLimits
    batch_dir: str  # of files and batches; empty: there are none


@message
class Alive:
    """API server → rank 0, once a second from when it has read the tokenizers: its loop runs."""


@message
class StartServer:
    """Rank 0 → API server, second message: the models, and the ids that its requests may use."""

    models: tuple[ModelFiles, ...]
    first_id: int  # of a request; later ones follow in steps of `id_step`
    id_step: int


@message
class ModelLimits:
    """What an API server checks requests against."""

    name: str
    max_model_len: int  # prompt and output tokens together
    vocab_size: int
    eos_ids: tuple[int, ...]


@message
class ServerState:
    """Rank 0 → API server, at each change and at least once a second."""

    state: str  # "starting", "ready", "stalled", "draining"
    reason: str  # for people: why the state is not "ready"
    limits: tuple[ModelLimits, ...]  # empty until the workers have started


@message
class OpenCall:
    """API server → rank 0, before the `Submit`s of a call: keep it, so that it can be continued.

    Another API server computes the same answer from these fields and the tokens.
    """

    call_id: str
    owner: str  # name of the API key; only the same key may continue the call
    url: str
    body: bytes  # of the HTTP request
    created: int  # unix time, seconds
    stream: bool
    request_ids: tuple[int, ...]  # one per choice


@message
class AttachCall:
    """API server → rank 0: send this call, its tokens so far, and those to come."""

    call_id: str
    owner: str


@message
class CallUnknown:
    """Rank 0 → API server: no such call of this owner, or it ended too long ago.

    Otherwise the answer to `AttachCall` is the `OpenCall`, then `Emit`s from the first token on.
    """

    call_id: str


@message
class Ask:
    """API server → rank 0: a question about the cluster, or an operator's command."""

    id: int  # of the question
    what: str
    arguments: str  # JSON


@message
class Answer:
    """Rank 0 → API server: the answer to an `Ask`."""

    id: int
    error: str  # empty: none
    body: str
