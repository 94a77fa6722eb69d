"""Hugging Face Transformers: small models with random weights give the logits of their plain attention."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from flashattn import hf  # noqa: E402

SMALL = dict(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "mistral, window": lambda: transformers.MistralConfig(**SMALL, sliding_window=8),
    "gemma 2, soft cap and window": lambda: transformers.Gemma2Config(
        **SMALL, head_dim=16, sliding_window=8, attn_logit_softcapping=5.0, query_pre_attn_scalar=16
    ),
    "gpt-oss, sinks": lambda: transformers.GptOssConfig(
        **SMALL, head_dim=16, sliding_window=8, num_local_experts=2, num_experts_per_tok=1
    ),
}


def models(config):
    hf.register()
    with pytest.raises(ValueError, match="without 'flash'"):
        hf.register("flashattn")
    torch.manual_seed(0)
    plain = transformers.AutoModelForCausalLM.from_config(config(), attn_implementation="eager").eval()
    ours = transformers.AutoModelForCausalLM.from_config(config(), attn_implementation="fused").eval()
    ours.load_state_dict(plain.state_dict())
    return ours, plain


@pytest.mark.filterwarnings("ignore")  # Transformers' own
@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    ours, plain = models(MODELS[name])
    tokens = torch.randint(3, 97, (2, 23))
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0  # padded on the left, as for generation
    results = []
    for model in (ours, plain):
        logits = model(tokens, attention_mask=mask).logits
        loss = torch.nn.functional.cross_entropy(logits[mask.bool()], tokens[mask.bool()])
        loss.backward()
        results.append([logits[mask.bool()], *(p.grad for p in model.parameters())])
    for a, b in zip(*results):
        if b is not None:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    options = dict(attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert torch.equal(ours.generate(tokens, **options), plain.generate(tokens, **options)), "with a cache"
