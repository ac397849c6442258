"""Do greedy tokens and logits equal those of Hugging Face transformers, at any batch size?

The reference computes prompt and answer in one float32 pass (teacher forcing): a token is right if
it is the likeliest after all tokens before it. A different token is acceptable only where the
reference's two greatest logits differ by less than 1e-4; such near ties are counted.
"""

import argparse
import json
import random
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import transformers
from record import add_json_option, finish
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mellmpi.config import BatchConfig, CacheConfig, ModelConfig
from mellmpi.engine import Executor, build_executor
from mellmpi.models import resolve
from mellmpi.protocol import GREEDY, SCHEDULER, Assign, Request
from mellmpi.worker import BatchScheduler

NEAR_TIE = 1e-4
DEMO = Path(__file__).parent.parent / "mellmpi" / "frontend" / "demo_prompts.jsonl"


@dataclass
class Answer:
    """One prompt, its output tokens, and the logits of each."""

    prompt: tuple[int, ...]
    outputs: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)


def texts() -> str:
    """The concatenated texts of the demo prompts."""
    bodies = [json.loads(line)["body"] for line in DEMO.read_text().splitlines()]
    return "\n\n".join(
        body["messages"][-1]["content"] if "messages" in body else body["prompt"] for body in bodies
    )


def prompts(
    tokenizer: PreTrainedTokenizerBase, count: int, shortest: int, longest: int
) -> list[tuple[int, ...]]:
    """Random pieces of the text; their lengths are evenly spaced on a logarithmic scale."""
    tokens = tokenizer(texts()).input_ids
    tokens = tokens * (1 + (longest + count) // len(tokens))
    rng = random.Random(0)
    lengths = [round(shortest * (longest / shortest) ** (i / (count - 1))) for i in range(count)]
    starts = [rng.randrange(len(tokens) - n) for n in lengths]
    return [tuple(tokens[s : s + n]) for s, n in zip(starts, lengths, strict=True)]


def decode(
    executor: Executor, submitted: list[tuple[int, ...]], num_out: int, batch: int
) -> list[Answer]:
    """Answers to all prompts, at most `batch` at a time, by the batch scheduler."""
    sampling = replace(GREEDY, max_tokens=num_out)
    answers = [Answer(prompt) for prompt in submitted]
    limits = BatchConfig(max_num_seqs=batch, max_num_batched_tokens=512)
    scheduler = BatchScheduler(executor.models, executor.arena.num_blocks, 0, limits, CacheConfig())
    waiting, model = list(range(len(submitted))), executor.model
    forward, seen = model.forward, {}
    model.forward = lambda *args: seen.setdefault("logits", forward(*args))
    try:
        while waiting or scheduler.sequences:
            while waiting and len(scheduler.sequences) < batch:
                i = waiting.pop()
                request = Request(i, executor.model_kv.model, submitted[i], sampling, None, 0, None)
                scheduler.handle(SCHEDULER, Assign(request, i + 1, ()))
            seen.clear()
            plan = scheduler.plan()
            result = executor.execute(plan)
            sampled = [c.request_id for c in plan.chunks if c.sampling]
            for row, (i, token) in enumerate(zip(sampled, result.tokens, strict=True)):
                answers[i].outputs.append(token)
                answers[i].logits.append(seen["logits"][row].clone())
            scheduler.commit(plan, result)
    finally:
        del model.forward
    return answers


@torch.inference_mode()
def compare(answers: list[Answer], reference: PreTrainedModel) -> dict[str, float]:
    """The differences between answers and the reference."""
    worst, near, wrong = 0.0, 0, 0
    for answer in answers:
        known = torch.tensor([[*answer.prompt, *answer.outputs[:-1]]])
        theirs = reference(known).logits[0, len(answer.prompt) - 1 :].float()
        worst = max(worst, (torch.stack(answer.logits) - theirs).abs().max().item())
        best = theirs.topk(2).values
        for row, token in enumerate(answer.outputs):
            if token != int(theirs[row].argmax()):
                tie = (best[row, 0] - best[row, 1]).item() < NEAR_TIE
                near, wrong = near + tie, wrong + (not tie)
    return {"max_logit_difference": worst, "near_ties": near, "wrong_tokens": wrong}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 7, 32])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "mellmpi")
    add_json_option(parser)
    args = parser.parse_args()
    directory = resolve(args.model, args.cache_dir)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    submitted = prompts(tokenizer, args.prompts, 10, 1000)
    executor = build_executor(
        directory,
        ModelConfig(model=args.model, dtype="float32"),
        CacheConfig(kv_cache_memory_bytes=4 << 30),
        device="cpu",
        num_threads=args.threads,
    )
    runs = {batch: decode(executor, submitted, args.tokens, batch) for batch in args.batches}
    executor.release()
    torch.set_num_threads(args.threads)
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    first = runs[args.batches[0]]
    results = {"against_transformers": compare(first, reference.eval())}
    for batch, answers in runs.items():
        same = [
            a.outputs == b.outputs and all(map(torch.equal, a.logits, b.logits))
            for a, b in zip(first, answers, strict=True)
        ]
        results[f"batch_{batch}_same_bits_as_batch_{args.batches[0]}"] = sum(same)
    config = {"model": args.model, "prompts": args.prompts, "tokens": args.tokens}
    config |= {"prompt_tokens": sum(map(len, submitted)), "batches": args.batches}
    finish(config, results, args.json)


if __name__ == "__main__":
    main()
