"""GGUF files of tiny models, written as by llama.cpp's converter."""

from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Kind

from mellmpi.models.gguf import convert

SHAPE = dict(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
)
CLASSES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny(family: str, **changes) -> transformers.PreTrainedModel:
    """A random model of transformers' with nontrivial biases and norms."""
    config = getattr(transformers, f"{CLASSES[family]}Config")(**{**SHAPE, **changes})
    torch.manual_seed(3)
    model = getattr(transformers, f"{CLASSES[family]}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    return model


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in NAMES:
        return f"{NAMES[stem]}.{kind}"
    _, _, index, part = stem.split(".", 3)
    return f"blk.{index}.{NAMES[part]}.{kind}"


def permuted(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's `permute` of q and k rows (convert_hf_to_gguf.py)."""
    half = rows.shape[0] // num_heads // 2
    return rows.reshape(num_heads, 2, half, -1).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    file: Path,
    model: transformers.PreTrainedModel,
    *,
    kind=Kind.F32,
    tokenizer=None,
    extra=None,
    rope_freqs=None,
) -> None:
    """`extra`: (method of GGUFWriter, value) pairs; `kind` is that of the matrices."""
    config = model.config
    family = config.model_type
    writer = gguf.GGUFWriter(str(file), family)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if family == "qwen3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    for method, value in extra or []:
        getattr(writer, method)(value)
    (tokenizer or byte_vocabulary)(writer)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs.astype(np.float32))
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        _add(writer, config, name, tensor.numpy(), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def converted(tmp_path: Path, model: transformers.PreTrainedModel, **options) -> Path:
    """The directory made from a GGUF file of a model; options of `write_gguf`."""
    file, target = tmp_path / "tiny.gguf", tmp_path / "out"
    write_gguf(file, model, **options)
    target.mkdir(exist_ok=True)
    convert(file, target, lambda text: None)
    return target


def _add(writer, config, name, values, kind) -> None:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for part, count in heads.items():
        if config.model_type == "llama" and part in name:
            values = permuted(values, count)
    if values.ndim == 1 or kind == Kind.F32:
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(values))
    else:
        packed = gguf.quants.quantize(np.ascontiguousarray(values), kind)
        writer.add_tensor(gguf_name(name), packed, raw_dtype=kind)


def byte_vocabulary(writer, pre: str = "gpt-2", merges=("Ġ t", "h e"), words=()) -> None:
    """Three control tokens, all bytes, a few merges, and words that no merges give."""
    from tokenizers.pre_tokenizers import ByteLevel

    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*control, *sorted(ByteLevel.alphabet())]
    tokens += ["".join(merge.split(" ")) for merge in merges] + list(words)
    tokens += [f"<unused{n}>" for n in range(SHAPE["vocab_size"] - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(control) + [1] * (len(tokens) - len(control)))
    writer.add_token_merges(list(merges))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def sentencepiece_vocabulary(writer) -> None:
    """A vocabulary like Llama 2's: <unk> <s> </s>, 256 bytes, pieces with scores."""
    pieces = [
        "▁",
        "t",
        "h",
        "e",
        "a",
        "c",
        "s",
        "o",
        "n",
        "▁t",
        "he",
        "▁the",
        "at",
        "▁c",
        "▁cat",
        "on",
        "▁s",
        "aa",
        "aaa",
        "[",
        "]",
    ]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *pieces]
    types = [2, 3, 3] + [6] * 256 + [1] * len(pieces)
    order = ["▁t", "he", "▁the", "at", "▁c", "▁cat", "on", "▁s", "aa", "aaa"]
    scores = [0.0] * 259 + [-float(order.index(p)) if p in order else -99.0 for p in pieces]
    missing = SHAPE["vocab_size"] - len(tokens)
    tokens += [f"<unused{n}>" for n in range(missing)]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores + [-1000.0] * missing)
    writer.add_token_types(types + [5] * missing)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
