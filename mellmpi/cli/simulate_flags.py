"""The flags of the command `simulate`."""

from mellmpi.cli.flags import POLICY_LINES, THRIFT, TRACES, Flag, Group
from mellmpi.cli.values import (
    FRACTION,
    GPUS,
    POSITIVE,
    SEED,
    TICK,
    hosted_models,
    profiles_by_model,
    sizes_by_model,
    switch,
)

SIMULATE = (
    Group(
        "workload",
        (
            Flag("trace", str, f"arrivals and lengths: {TRACES}", "FILE"),
            Flag("rate-scale", POSITIVE, "requests arrive X times as fast (default: 1)", "X"),
            Flag("seed", SEED, "of random choices (default: 0)", "N"),
        ),
    ),
    Group(
        "models and GPUs",
        (
            Flag(
                "model",
                profiles_by_model,
                "a known model, for sizes and times; for several, by their names in the trace: "
                "chat=llama-2-7b,code=llama-3-8b",
                "NAME",
            ),
            Flag(
                "kv-bytes-per-token",
                sizes_by_model,
                "of any other model, such as 512K; for several, by their names in the trace: "
                "a=512K,b=128K",
                "SIZE",
            ),
            Flag(
                "hosts",
                hosted_models,
                "of several models, those on each GPU: a,b,a+b for three GPUs; further GPUs begin "
                "again with the first set (default: every GPU hosts all)",
                "MODELS",
            ),
            Flag("gpu-kv-gib", POSITIVE, "GiB of KV cache per GPU", "G"),
            Flag("gpus", GPUS, "most GPUs (default: as many as a policy uses)", "MAX"),
        ),
    ),
    Group(
        "policies",
        (
            Flag(
                "policies",
                str,
                "placement and migration policies to compare, comma-separated (default: all)\n"
                f"{POLICY_LINES}",
                "NAMES",
            ),
            Flag("thrift", FRACTION, f"{THRIFT} (for frugal; default: 0.5)", "X"),
            Flag("frontier", switch, "also run frugal at thrifts from 0 to 1", is_switch=True),
            Flag("tick-s", TICK, "time between two looks of the policy (default: 0.25)", "S"),
        ),
    ),
    Group(
        "time",
        (
            Flag(
                "profile",
                str,
                "durations of steps, transfers and waking, without --ideal: A100-40G (default), "
                "RTX-4090, H100",
                "GPU",
            ),
            Flag(
                "cost-from",
                str,
                "replaces --profile: durations measured by a run (its run-batch --report)",
                "REPORT",
            ),
            Flag("ideal", switch, "prefill, waking and migrations take no time", is_switch=True),
            Flag(
                "decode-rate",
                POSITIVE,
                "tokens per second of every request, with --ideal (default: 30)",
                "R",
            ),
        ),
    ),
    Group(
        "figures",
        (
            Flag("json", str, "write the figures", "OUT"),
            Flag("plot", str, "draw the figures", "OUT.png"),
        ),
    ),
)
