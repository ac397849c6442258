"""The compiled model: bits that depend on the request only, all kinds of shapes, SmolLM2."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import transformers

from mellmpi.engine import KvArena, KvGeometry, PackedBatch, weights
from mellmpi.engine.cpu import CpuModel, unsupported
from mellmpi.engine.cuda import TorchModel
from mellmpi.models import Architecture, parameter_shapes

DTYPES = [torch.float32, torch.bfloat16]
PLAIN = Architecture(
    family="llama",
    num_layers=2,
    hidden_size=72,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=100,
    vocab_size=131,
    max_position=4096,
    rope_theta=1e4,
    rope_scaling=None,
    rms_norm_eps=1e-5,
    tie_embeddings=True,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    sliding_window=None,
    bos_id=1,
    eos_ids=(2,),
)
ARCHITECTURES = {
    "tied, nothing a multiple of 32": PLAIN,
    "untied, wide heads, seven share": replace(
        PLAIN, num_heads=14, head_dim=48, tie_embeddings=False
    ),
    "biases and window": replace(
        PLAIN, qkv_bias=True, o_bias=True, mlp_bias=True, sliding_window=23, num_kv_heads=6
    ),
    "norms of heads": replace(PLAIN, family="qwen3", qk_norm=True, head_dim=32, num_layers=3),
}


def random_weights(arch, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(dtype)
        for name, shape in parameter_shapes(arch).items()
    }


def bits(tensor):
    return tensor.view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)


class Served:
    """A model and its arena: computes sequences in any chunks, over any blocks."""

    def __init__(self, model, block_size=16, num_blocks=64, seed=0):
        arch = model.arch
        geometry = KvGeometry(
            model="m",
            dtype=model.dtype,
            num_layers=arch.num_layers,
            num_kv_heads=arch.num_kv_heads,
            block_size=block_size,
            head_dim=arch.head_dim,
        )
        self.model, self.arena = model, KvArena(geometry, num_blocks)
        self.arena.tensor.fill_(3e4)  # what other sequences left behind
        self.free = np.random.default_rng(seed).permutation(num_blocks).tolist()

    def take(self, num_tokens):
        return [self.free.pop() for _ in range(-(-num_tokens // self.arena.block_size))]

    def step(self, *chunks):
        """Each (tokens of the sequence, start, end, its blocks); logits of every last row."""
        lengths = [end - start for _, start, end, _ in chunks]
        tables = np.zeros((len(chunks), max(len(table) for *_, table in chunks)), np.int32)
        for row, (*_, table) in enumerate(chunks):
            tables[row, : len(table)] = table
        batch = PackedBatch(
            tokens=np.concatenate([t[s:e] for t, s, e, _ in chunks]).astype(np.int32),
            positions=np.concatenate([np.arange(s, e) for _, s, e, _ in chunks]).astype(np.int32),
            cu_chunks=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
            context_lens=np.array([e for _, _, e, _ in chunks], np.int32),
            block_tables=tables,
            num_sampled=len(chunks),
        )
        return self.model.forward(batch, self.arena)

    def alone(self, tokens, edges):
        """Logits after the last token and the sequence's blocks, computed in these chunks."""
        table = self.take(len(tokens))
        for start, end in zip([0, *edges], [*edges, len(tokens)], strict=True):
            logits = self.step((tokens, start, end, table))
        return logits[0], self.arena.tensor[table]


def same(ours, theirs):
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(ours, theirs, strict=True))


def prompt(length, seed=0, vocab=131):
    return np.random.default_rng(seed).integers(0, vocab, length)


@pytest.fixture(scope="module", params=DTYPES, ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture(params=ARCHITECTURES)
def model(request, dtype):
    arch = ARCHITECTURES[request.param]
    return CpuModel(arch, random_weights(arch, dtype), dtype, num_threads=1)


# --- the same bits -------------------------------------------------------------------------------


def test_a_prompt_has_the_same_bits_for_any_division_into_chunks(model):
    tokens = prompt(80)
    at_once = Served(model).alone(tokens, [])
    assert same(Served(model, seed=1).alone(tokens, [1, 2, 19, 48, 79]), at_once)
    assert same(Served(model, seed=2).alone(tokens, list(range(1, 80))), at_once)


def test_a_sequence_has_the_same_bits_alone_and_in_any_batch(model):
    tokens, others = prompt(50), [prompt(n, seed=n) for n in (1, 5, 16, 33, 64, 70)]
    alone = Served(model).alone(tokens, [20, 49])
    served = Served(model, seed=3)
    table, tables = served.take(50), [served.take(len(o)) for o in others]
    whole = [(o, 0, len(o), t) for o, t in zip(others, tables, strict=True)]
    served.step(*whole[:2], (tokens, 0, 20, table), *whole[2:])
    served.step(*whole[:5], (tokens, 20, 49, table))
    last = served.step((tokens, 49, 50, table), *whole[4:])
    assert same((last[0], served.arena.tensor[table]), alone)


def test_threads_do_not_change_a_bit(dtype):
    arch = ARCHITECTURES["untied, wide heads, seven share"]
    alone = Served(CpuModel(arch, random_weights(arch, dtype), dtype, 1)).alone(
        prompt(80), [60, 79]
    )
    for num_threads in (2, 3):
        model = CpuModel(arch, random_weights(arch, dtype), dtype, num_threads)
        assert all(same(Served(model).alone(prompt(80), [60, 79]), alone) for _ in range(5))


def test_logits_do_not_depend_on_the_block_size(dtype):
    model = CpuModel(PLAIN, random_weights(PLAIN, dtype), dtype, num_threads=1)
    small, large = (Served(model, size).alone(prompt(70), [30])[0] for size in (16, 48))
    assert torch.equal(small, large)


def test_garbage_in_unused_slots_does_not_change_logits(dtype):
    """A broken request may leave NaN in blocks that another request reuses."""
    model = CpuModel(PLAIN, random_weights(PLAIN, dtype), dtype, num_threads=1)
    clean, poisoned = Served(model), Served(model)
    poisoned.arena.tensor.fill_(torch.nan)
    for edges in ([], [7], [1, 2, 3, 17]):
        ours, theirs = poisoned.alone(prompt(21), edges)[0], clean.alone(prompt(21), edges)[0]
        assert torch.equal(ours, theirs)


def test_logits_do_not_depend_on_how_the_rope_table_grew(dtype):
    model = CpuModel(PLAIN, random_weights(PLAIN, dtype), dtype, num_threads=1)
    grown = Served(model, num_blocks=140).alone(prompt(2100), [900, 1100])
    fresh = CpuModel(PLAIN, random_weights(PLAIN, dtype), dtype, num_threads=1)
    assert same(grown, Served(fresh, num_blocks=140).alone(prompt(2100), []))


# --- correct values ------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_logits_equal_those_of_plain_torch(arch):
    kernels = CpuModel(arch, random_weights(arch, torch.float32), torch.float32, num_threads=1)
    plain = TorchModel(arch, random_weights(arch, torch.float32), torch.float32, "cpu")
    for edges in ([], [1, 30, 31]):
        ours, theirs = (Served(model).alone(prompt(70), edges)[0] for model in (kernels, plain))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


# --- weights and limits --------------------------------------------------------------------------


def test_packing_empties_the_dictionary_of_weights():
    arch = ARCHITECTURES["biases and window"]
    tensors = random_weights(arch, torch.float32)
    CpuModel(arch, tensors, torch.float32, num_threads=1)
    assert not tensors


def test_unsupported_shapes_and_dtypes_are_named():
    assert unsupported(PLAIN, torch.float32, 16) is None
    assert "head_dim" in unsupported(replace(PLAIN, head_dim=24), torch.float32, 16)
    assert "--block-size" in unsupported(PLAIN, torch.float32, 8)
    assert "float16" in unsupported(PLAIN, torch.float16, 16)
    with pytest.raises(ValueError, match="head_dim"):
        CpuModel(replace(PLAIN, head_dim=24), {}, torch.float32, num_threads=1)


def test_warming_up_leaves_nothing_to_compile():
    model = CpuModel(PLAIN, random_weights(PLAIN, torch.float32), torch.float32, num_threads=2)
    model.warm_up()
    logits, _ = Served(model).alone(prompt(5), [])
    assert logits.isfinite().all()


# --- the real model ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(smollm2):
    return {
        dtype: CpuModel(*weights.load(smollm2, dtype, torch.device("cpu")), dtype, num_threads=1)
        for dtype in DTYPES
    }


def test_smollm2_has_the_logits_of_transformers(real, smollm2):
    reference = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    for length in (10, 200):
        tokens = prompt(length, vocab=49000)
        with torch.inference_mode():
            expected = reference(torch.from_numpy(tokens)[None]).logits[0, -1]
        logits, _ = Served(real[torch.float32]).alone(tokens, [length // 2])
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)


def test_smollm2_has_the_same_bits_for_any_chunks_and_batch(real, dtype):
    tokens, other = prompt(150, vocab=49000), prompt(40, seed=1, vocab=49000)
    at_once = Served(real[dtype]).alone(tokens, [])
    served = Served(real[dtype], seed=1)
    table, company = served.take(150), served.take(40)
    edges = [0, 1, 100, *range(130, 151)]
    for start, end in pairwise(edges):
        logits = served.step((other, 0, 40, company), (tokens, start, end, table))
    assert same((logits[1], served.arena.tensor[table]), at_once)
