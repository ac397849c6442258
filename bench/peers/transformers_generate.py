"""Hugging Face transformers: `generate` on the whole batch."""

import argparse
from pathlib import Path

import torch
import transformers
from answer import answer, channel
from transformers import AutoModelForCausalLM


def main() -> None:
    send = channel()
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--max-len", type=int, required=True)
    parser.add_argument("--max-requests", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def run(prompts: list[list[int]], num_out: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=num_out,
            max_new_tokens=num_out,
            pad_token_id=0,
        )
        return out[:, ids.shape[1] :].tolist()

    answer(send, f"transformers {transformers.__version__}, torch {torch.__version__}", run)


if __name__ == "__main__":
    main()
