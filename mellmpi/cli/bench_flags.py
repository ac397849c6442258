"""The flags of the command `bench serve`, named as in `vllm bench serve`."""

from mellmpi.cli.flags import TRACES, Flag, Group
from mellmpi.cli.values import (
    COUNT,
    NUMBER,
    POSITIVE,
    SECONDS,
    SEED,
    RealNumber,
    WholeNumber,
    json_object,
    one_of,
    pair,
    positive_or_inf,
    switch,
)

TEXT_OF_BENCH = """\
Send requests to any server with OpenAI's API, and measure its answers. Flags, figures and JSON keys
are those of `vllm bench serve`. The environment's OPENAI_API_KEY is sent as the key.

TTFT: sending to the first text. TPOT: (end - first text) / (tokens - 1). ITL: gap between two
chunks. E2EL: sending to the end. Tokens are counted by the server (usage), else by --tokenizer,
else a chunk is a token. Exit code 1: no request was answered; 2: flags; 130: interrupted, after the
figures so far."""
EXAMPLES_OF_BENCH = """examples:
  python -m mellmpi bench serve --num-prompts 64 --request-rate 2
  python -m mellmpi bench serve --base-url http://host:8000 --backend openai-chat \\
      --dataset-name sharegpt --dataset-path sharegpt.json --tokenizer DIR --plot run.png
  python -m mellmpi bench serve --dataset-name trace --dataset-path trace.csv --rate-scale 2 \\
      --goodput ttft:500 tpot:50 --save-result"""
METRICS, OBJECTIVES = ("ttft", "tpot", "itl", "e2el"), ("ttft", "tpot", "e2el")
PERCENT, RATIO = RealNumber(0, 100), RealNumber(0, 0.999)


def objective(text: str) -> tuple[str, float]:
    """A metric and its limit in milliseconds: "ttft:200"."""
    name, _, limit = text.partition(":")
    return one_of(OBJECTIVES, name), SECONDS(limit)


def metrics(text: str) -> tuple[str, ...]:
    """Comma-separated metrics."""
    return tuple(dict.fromkeys(one_of(METRICS, name) for name in text.split(",")))


def percentiles(text: str) -> tuple[float, ...]:
    """Comma-separated percentiles."""
    return tuple(dict.fromkeys(PERCENT(part) for part in text.split(",")))


def custom_length(text: str) -> int | None:
    """A number of tokens; None for -1, vLLM's way to say: as the file says."""
    return None if text.strip() == "-1" else COUNT(text)


SERVER = Group(
    "server",
    (
        Flag("base-url", str, "address, such as http://host:8000; replaces --host and --port", "U"),
        Flag("host", str, "default: 127.0.0.1", "H"),
        Flag("port", WholeNumber(1, 65_535), "default: 8000", "P"),
        Flag(
            "backend",
            str,
            "openai (default): /v1/completions; vllm: the same; openai-chat: /v1/chat/completions",
            choices=("openai", "openai-chat", "vllm"),
        ),
        Flag("endpoint", str, "another path than that of the backend", "/PATH"),
        Flag(
            "model",
            str,
            "model that requests name (default: the first that the server lists); a directory is "
            "also the --tokenizer",
            "M",
        ),
        Flag("served-model-name", str, "name of the model in requests, if not --model", "NAME"),
        Flag(
            "tokenizer",
            str,
            "directory with tokenizer.json, or a hub name: makes prompts of exact lengths, and "
            "counts tokens where the server does not",
            "T",
        ),
        Flag("header", pair, "sent with each request", "KEY=VALUE", takes_several=True),
        Flag(
            "extra-body",
            json_object,
            "JSON object, added to each body; null removes a field",
            "JSON",
        ),
        Flag("insecure", switch, "do not check the server's certificate", is_switch=True),
    ),
)
DATASET = Group(
    "requests",
    (
        Flag(
            "dataset-name",
            str,
            "random (default): made-up prompts\n"
            "sharegpt: JSON list of conversations, the first turn is the prompt\n"
            'custom: JSON Lines {"prompt": "…", "output_tokens": N}\n'
            f"trace: arrivals and lengths; {TRACES}",
            choices=("random", "sharegpt", "custom", "trace"),
        ),
        Flag("dataset-path", str, "file of the dataset", "FILE"),
        Flag("num-prompts", COUNT, "number of requests (default: 1000; of a trace: all)", "N"),
        Flag("seed", SEED, "of prompts, order and arrivals (default: 0)", "N"),
        Flag(
            "prompt-form",
            str,
            "made-up prompts are sent as text (default) or as token ids, which need no tokenizer "
            "for an exact length",
            choices=("text", "ids"),
        ),
        Flag("random-input-len", COUNT, "mean tokens of a prompt (default: 1024)", "N"),
        Flag("random-output-len", COUNT, "mean tokens of an answer (default: 128)", "N"),
        Flag(
            "random-range-ratio",
            RATIO,
            "lengths are uniform in mean·(1 ± X) (default: 0)",
            "X",
        ),
        Flag("random-prefix-len", NUMBER, "tokens that all prompts begin with (default: 0)", "N"),
        Flag("sharegpt-output-len", COUNT, "tokens of an answer (default: as in the dataset)", "N"),
        Flag(
            "custom-output-len",
            custom_length,
            "tokens of an answer (default: as in the dataset, else 256)",
            "N",
        ),
        Flag("length-scale", POSITIVE, "lengths of a trace are X times as long", "X"),
        Flag("disable-shuffle", switch, "keep the order of the file", is_switch=True),
        Flag("no-oversample", switch, "use no prompt of the file twice", is_switch=True),
    ),
)
SAMPLING = Group(
    "sampling (default: as the server does)",
    (
        Flag(
            "ignore-eos",
            switch,
            "answers have the length asked for (default: for random and trace)",
            is_switch=True,
        ),
        Flag("temperature", RealNumber(0, 100), "0: greedy", "X"),
        Flag("top-p", RealNumber(0, 1), "share of probability that is sampled from", "X"),
        Flag("top-k", WholeNumber(-1, 2**31 - 1), "number of tokens that are sampled from", "N"),
        Flag("min-p", RealNumber(0, 1), "least probability, as a share of the highest", "X"),
        Flag("frequency-penalty", RealNumber(-2, 2), "as in OpenAI's API", "X"),
        Flag("presence-penalty", RealNumber(-2, 2), "as in OpenAI's API", "X"),
        Flag("repetition-penalty", POSITIVE, "as in vLLM", "X"),
        Flag("logprobs", NUMBER, "number of logprobs for each token", "N"),
    ),
)
ARRIVALS = Group(
    "arrivals",
    (
        Flag(
            "request-rate",
            positive_or_inf,
            "requests per second, as a Poisson process (default: inf, all at once)",
            "R",
        ),
        Flag(
            "burstiness",
            positive_or_inf,
            "shape of the gamma distribution of gaps; 1 (default): Poisson, below: bursts, "
            "inf: equal gaps",
            "X",
        ),
        Flag("max-concurrency", COUNT, "most requests in flight", "N"),
        Flag("rate-scale", POSITIVE, "requests of a trace arrive X times as fast", "X"),
        Flag("num-warmups", NUMBER, "requests that are sent before and not measured", "N"),
        Flag(
            "ready-check-timeout-sec",
            SECONDS,
            "wait so long for the server, until it answers a request (default: 0, no check)",
            "S",
        ),
    ),
)
OUTPUTS = Group(
    "figures",
    (
        Flag(
            "goodput",
            objective,
            "objectives in ms, such as ttft:200 tpot:50 e2el:5000; goodput counts the requests "
            "that keep all",
            "METRIC:MS",
            takes_several=True,
        ),
        Flag("percentile-metrics", metrics, f"sections (default: {','.join(METRICS)})", "NAMES"),
        Flag("metric-percentiles", percentiles, "such as 50,90,99 (default: 99)", "P"),
        Flag("save-result", switch, "write the figures as JSON", is_switch=True),
        Flag("save-detailed", switch, "with those of each request, and texts", is_switch=True),
        Flag("result-dir", str, "default: the current directory", "DIR"),
        Flag(
            "result-filename",
            str,
            "default: LABEL-RATEqps-MODEL-DATE.json",
            "FILE",
        ),
        Flag("label", str, "begins the name of the result (default: the backend)", "L"),
        Flag("metadata", pair, "kept in the result", "KEY=VALUE", takes_several=True),
        Flag(
            "plot",
            str,
            "draw distributions of TTFT, TPOT, E2EL, and tokens/s over time",
            "FILE.png",
        ),
        Flag("disable-tqdm", switch, "no progress bar", is_switch=True),
    ),
)
BENCH_SERVE = (SERVER, DATASET, SAMPLING, ARRIVALS, OUTPUTS)
