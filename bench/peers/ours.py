"""mellmpi: `run-batch` with requests and answers as JSON lines.

Scheduler and worker share one process (a world of one rank), which runs on the same cores as the
other systems.
"""

import argparse
import json
import subprocess
import sys

from answer import answer, channel

import mellmpi


def line(index: int, prompt: list[int], num_out: int) -> str:
    body = {
        "model": "m",
        "prompt": prompt,
        "max_tokens": num_out,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    entry = {"custom_id": str(index), "method": "POST", "url": "/v1/completions", "body": body}
    return json.dumps(entry) + "\n"


def start(args: argparse.Namespace) -> subprocess.Popen:
    flags = {
        "--model": args.model,
        "--served-model-name": "m",
        "--dtype": "bfloat16",
        "--device": "cpu",
        "--threads": args.threads,
        "--max-num-seqs": args.max_requests,
        "-i": "-",
        "-o": "-",
    }
    command = [sys.executable, "-m", "mellmpi", "run-batch"]
    return subprocess.Popen(
        [*command, *(str(x) for flag in flags.items() for x in flag)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


class Runner:
    """Sends requests to one `run-batch` process, which skips ids that it has answered before."""

    def __init__(self, process: subprocess.Popen):
        self._process, self._submitted = process, 0

    def run(self, prompts: list[list[int]], num_out: int) -> list[list[int]]:
        ids = range(self._submitted, self._submitted + len(prompts))
        self._submitted = ids.stop
        lines = [line(i, prompt, num_out) for i, prompt in zip(ids, prompts, strict=True)]
        self._process.stdin.write("".join(lines))
        self._process.stdin.flush()
        outputs = dict(self._answer() for _ in ids)
        return [outputs[i] for i in ids]

    def _answer(self) -> tuple[int, list[int]]:
        done = json.loads(self._process.stdout.readline())
        assert done["error"] is None, done
        return int(done["custom_id"]), done["response"]["body"]["choices"][0]["token_ids"]


def main() -> None:
    send = channel()
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--max-len", type=int, required=True)
    parser.add_argument("--max-requests", type=int, required=True)
    args = parser.parse_args()
    process = start(args)
    runner = Runner(process)
    runner.run([[1]], 1)  # returns when the model is loaded
    answer(send, f"mellmpi {mellmpi.__version__}", runner.run)
    process.stdin.close()
    process.wait()


if __name__ == "__main__":
    main()
