"""Checkpoints with the shapes of known models and random weights, so that speeds can be compared without a download.

Each is made twice, from the same numbers: in the hub's layout (safetensors in bf16, `config.json`, a tokenizer that knows
bytes), and as GGUF in bf16, from which llama.cpp's own `llama-quantize` makes the packed formats. Speed doesn't depend on
the values, with one exception that is avoided here: numbers so small that they are denormal. What would overflow or
vanish over the blocks doesn't either, because each block normalises what it reads.
"""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

# Weights repeat after so many numbers: a prime, so that no two rows are alike.
DRAWN = 4_194_301


@dataclass(frozen=True)
class Shape:
    name: str
    model_type: str
    architecture: str
    hidden: int
    blocks: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocab: int
    rope_theta: float
    eps: float
    qk_norm: bool

    def tensors(self):
        """(name in safetensors, name in GGUF, shape, whether it is a norm), in the order of the files."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        yield "model.embed_tokens.weight", "token_embd.weight", (self.vocab, self.hidden), False
        for block in range(self.blocks):
            theirs, ours = f"model.layers.{block}.", f"blk.{block}."
            yield theirs + "input_layernorm.weight", ours + "attn_norm.weight", (self.hidden,), True
            for name, packed, shape in [
                ("self_attn.q_proj", "attn_q", (queries, self.hidden)),
                ("self_attn.k_proj", "attn_k", (keys, self.hidden)),
                ("self_attn.v_proj", "attn_v", (keys, self.hidden)),
                ("self_attn.o_proj", "attn_output", (self.hidden, queries)),
                ("mlp.gate_proj", "ffn_gate", (self.intermediate, self.hidden)),
                ("mlp.up_proj", "ffn_up", (self.intermediate, self.hidden)),
                ("mlp.down_proj", "ffn_down", (self.hidden, self.intermediate)),
            ]:
                yield f"{theirs}{name}.weight", f"{ours}{packed}.weight", shape, False
            if self.qk_norm:
                yield theirs + "self_attn.q_norm.weight", ours + "attn_q_norm.weight", (self.head_size,), True
                yield theirs + "self_attn.k_norm.weight", ours + "attn_k_norm.weight", (self.head_size,), True
            yield theirs + "post_attention_layernorm.weight", ours + "ffn_norm.weight", (self.hidden,), True
        yield "model.norm.weight", "output_norm.weight", (self.hidden,), True

    def config(self):
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocab,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.eps,
            "max_position_embeddings": 40960,
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "bos_token_id": 0,
            "eos_token_id": 1,
        }


SHAPES = {
    "qwen3-0.6b": Shape(
        "qwen3-0.6b", "qwen3", "Qwen3ForCausalLM", 1024, 28, 16, 8, 128, 3072, 151_936, 1e6, 1e-6, True
    ),
    "llama-3.2-1b": Shape(
        "llama-3.2-1b", "llama", "LlamaForCausalLM", 2048, 16, 32, 8, 64, 8192, 128_256, 5e5, 1e-5, False
    ),
}


def values(shape, norm, offset):
    """Numbers of one tensor, f32: ones for a norm, else normal with a spread of 0.02."""
    if norm:
        return np.ones(shape, np.float32)
    drawn = np.random.default_rng(7).standard_normal(DRAWN, np.float32) * 0.02
    return np.resize(np.roll(drawn, -offset % DRAWN), shape)


def bf16(array):
    """The upper halves of f32 numbers, rounded to nearest even, as u16."""
    bits = array.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_hub(shape, directory):
    """`directory` in the hub's layout; made once."""
    if (directory / "config.json").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    header, at = {}, 0
    for name, _, dims, _ in shape.tensors():
        size = 2 * int(np.prod(dims))
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, (_, _, dims, norm) in enumerate(shape.tensors()):
            file.write(bf16(values(dims, norm, number * 10007)).tobytes())
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer()))
    (directory / "config.json").write_text(json.dumps(shape.config(), indent=1))
    return directory


def tokenizer():
    """Bytes as tokens, in byte-level BPE without merges: enough for text to become ids."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(hidden))]
    special = [("<s>", 0), ("</s>", 1)]
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True}
            for text, i in special
        ],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {"type": "BPE", "vocab": dict(special) | {letter: 2 + i for i, letter in enumerate(letters)},
                  "merges": []},
    }


def write_gguf(shape, path):
    """One GGUF file in bf16, without a vocabulary; made once."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, shape.model_type, use_temp_file=False)
    writer.add_name(shape.name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_block_count(shape.blocks)
    writer.add_context_length(40960)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_size)
    writer.add_value_length(shape.head_size)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.eps)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("none")
    for number, (_, name, dims, norm) in enumerate(shape.tensors()):
        array = values(dims, norm, number * 10007)
        if norm:
            writer.add_tensor(name, array)
        else:
            bits = bf16(array)
            writer.add_tensor(name, bits.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(path)
    return path


def quantize(path, kind, llama):
    """`path` in the packed format `kind` ("Q8_0", "Q4_K", …) throughout, made by llama.cpp's own tool; made once."""
    packed = path.with_name(f"{path.stem.removesuffix('-BF16')}-{kind}.gguf")
    if not packed.exists():
        part = packed.with_suffix(".part")
        subprocess.run(
            [llama / "llama-quantize", "--pure", path, part, kind], check=True, capture_output=True, text=True
        )
        part.rename(packed)
    return packed
