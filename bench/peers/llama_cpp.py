"""llama.cpp's server on a BF16 GGUF, over HTTP with one connection for each request."""

import argparse
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from answer import answer, channel


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_server(args: argparse.Namespace, port: int) -> subprocess.Popen:
    threads, slots = str(args.threads), args.max_requests
    return subprocess.Popen(
        [
            args.server,
            "--model",
            args.model,
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--threads",
            threads,
            "--threads-batch",
            threads,
            "--threads-http",
            str(slots + 2),
            "--parallel",
            str(slots),
            "--ctx-size",
            str(slots * args.max_len),
            "--no-kv-unified",
            "--cache-ram",
            "0",
            "--no-cache-prompt",
            "--no-webui",
            "--cache-type-k",
            args.kv_type,
            "--cache-type-v",
            args.kv_type,
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def wait_until_healthy(server: subprocess.Popen, url: str) -> None:
    while True:
        if server.poll() is not None:
            raise SystemExit(f"llama-server ended with code {server.returncode}")
        try:
            urllib.request.urlopen(url + "/health").read()
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)


def complete(url: str, prompt: list[int], num_out: int) -> list[int]:
    body = {
        "prompt": prompt,
        "n_predict": num_out,
        "ignore_eos": True,
        "temperature": 0,
        "cache_prompt": False,
        "return_tokens": True,
        "stream": False,
    }
    request = urllib.request.Request(
        url + "/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return json.load(urllib.request.urlopen(request))["tokens"]


def version(server: str) -> str:
    done = subprocess.run([server, "--version"], capture_output=True, text=True, check=True)
    return "llama.cpp " + (done.stderr + done.stdout).split("version:")[1].split("\n")[0].strip()


def main() -> None:
    send = channel()
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True, help="a GGUF file")
    parser.add_argument("--server", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--max-len", type=int, required=True)
    parser.add_argument("--max-requests", type=int, required=True)
    parser.add_argument(
        "--kv-type", default="f16", help="default: f16, as in llama.cpp; bf16 is slower"
    )
    args = parser.parse_args()
    port = free_port()
    url, server = f"http://127.0.0.1:{port}", start_server(args, port)
    try:
        wait_until_healthy(server, url)
        with ThreadPoolExecutor(args.max_requests) as pool:
            answer(
                send,
                version(args.server),
                lambda prompts, n: list(pool.map(lambda ids: complete(url, ids, n), prompts)),
            )
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
