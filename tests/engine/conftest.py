"""Tiny models of every family with their transformers twins, and a runner over paged KV."""

from dataclasses import dataclass, field, replace
from functools import cache

import pytest
import torch
import transformers

from mellmpi.engine import KvArena, KvGeometry, pack
from mellmpi.engine.cpu import CpuModel
from mellmpi.engine.cuda import TorchModel
from mellmpi.models import Architecture
from mellmpi.protocol import GREEDY, Chunk, Sampling, StepPlan

SHAPE = dict(
    vocab_size=131,
    hidden_size=96,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
VARIANTS = {
    "llama": ("Llama", dict(tie_word_embeddings=False)),
    "llama-tied-no-gqa": ("Llama", dict(tie_word_embeddings=True, num_key_value_heads=6)),
    "llama-one-kv-head": ("Llama", dict(num_key_value_heads=1, tie_word_embeddings=True)),
    "llama-biases": ("Llama", dict(attention_bias=True, mlp_bias=True)),
    "llama3-rope": ("Llama", dict(rope_parameters=LLAMA3)),
    "llama-linear-rope": ("Llama", dict(rope_parameters=LINEAR)),
    "llama-yarn-rope": ("Llama", dict(rope_parameters=YARN)),
    "llama-wide-heads": ("Llama", dict(head_dim=32)),
    "mistral": ("Mistral", dict(sliding_window=None)),
    "mistral-window": ("Mistral", dict(sliding_window=11, head_dim=32)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(head_dim=32)),
}


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Two compute threads on shared cores stall each other by 10x and more."""
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Twin:
    """One tiny random model: transformers' model, and the architecture and weights for ours."""

    arch: Architecture
    reference: transformers.PreTrainedModel

    def weights(self) -> dict[str, torch.Tensor]:
        state = {name: value.clone() for name, value in self.reference.state_dict().items()}
        if self.arch.tie_embeddings:
            state.pop("lm_head.weight", None)
        return state

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        """float32 [n, vocab]: the logits of every position."""
        return self.reference(torch.tensor([tokens])).logits[0].float()


@cache
def twin(variant: str, dtype: torch.dtype = torch.float32) -> Twin:
    name, changes = VARIANTS[variant]
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **changes})
    torch.manual_seed(7)
    reference = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for name, parameter in reference.named_parameters():  # biases and norms start out trivial
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    return Twin(Architecture.from_hf(config.to_dict()), reference.to(dtype))


MAKERS = {
    "torch": lambda arch, weights, dtype: TorchModel(arch, weights, dtype, "cpu"),
    "cpu": lambda arch, weights, dtype: CpuModel(arch, weights, dtype, num_threads=1),
}
BLOCK_SIZES = {"torch": 4, "cpu": 16}  # the smallest that each supports


@pytest.fixture(params=list(MAKERS))
def model_class(request):
    """The name of each model class."""
    return request.param


@pytest.fixture(params=list(VARIANTS))
def any_twin(request) -> Twin:
    return twin(request.param)


@pytest.fixture
def get_twin():
    return twin


@pytest.fixture
def greedy() -> Sampling:
    return replace(GREEDY, max_tokens=8)


@dataclass
class Sequence:
    tokens: list[int]
    table: list[int] = field(default_factory=list)
    num_computed: int = 0


class Paged:
    """Runs chunks of sequences through a model, over blocks in a shuffled order."""

    def __init__(self, model, arch, dtype, sampling, block_size, num_blocks=200, seed=0):
        geometry = KvGeometry(
            model="tiny",
            dtype=dtype,
            num_layers=arch.num_layers,
            num_kv_heads=arch.num_kv_heads,
            block_size=block_size,
            head_dim=arch.head_dim,
        )
        self.model, self.sampling = model, sampling
        self.arena = KvArena(geometry, num_blocks)
        shuffled = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed))
        self.free = shuffled.tolist()

    def chunk(self, seq: Sequence, n: int, sampled: bool) -> Chunk:
        start, end = seq.num_computed, seq.num_computed + n
        while len(seq.table) * self.arena.block_size < end:
            seq.table.append(self.free.pop())
        seq.num_computed = end
        sampling = self.sampling if sampled else None
        return Chunk(
            0, start, tuple(seq.tokens[start:end]), seq.table, sampling, (tuple(seq.tokens), [])
        )

    def step(self, *chunks: tuple[Sequence, int]) -> torch.Tensor:
        """Compute the next n tokens of each sequence; logits [chunks, vocab] of the last ones."""
        plan = StepPlan("m", tuple(self.chunk(seq, n, True) for seq, n in chunks), ())
        return self.model.forward(pack(plan, self.arena.block_size), self.arena)

    def fill(self, *chunks: tuple[Sequence, int]) -> None:
        """As `step`, without logits."""
        plan = StepPlan("m", tuple(self.chunk(seq, n, False) for seq, n in chunks), ())
        logits = self.model.forward(pack(plan, self.arena.block_size), self.arena)
        assert logits.shape[0] == 0


@pytest.fixture
def paged(model_class, greedy):
    """(twin, dtype) -> Paged."""

    def build(twin: Twin, dtype=torch.float32) -> Paged:
        model = MAKERS[model_class](twin.arch, twin.weights(), dtype)
        return Paged(model, twin.arch, dtype, greedy, BLOCK_SIZES[model_class])

    return build


@pytest.fixture
def sequence():
    """(length, seed) -> Sequence of random tokens."""

    def build(length: int, seed: int = 0, vocab: int = 131) -> Sequence:
        generator = torch.Generator().manual_seed(seed)
        return Sequence(torch.randint(vocab, (length,), generator=generator).tolist())

    return build
