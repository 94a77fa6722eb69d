"""JAX: values and gradients under jit, grad and vmap, against plain jax.numpy in float64 (by NumPy's)."""

import os

import numpy as np
import pytest

# Beside PyTorch in one process: no three quarters of the GPU's memory in advance.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

import flashattn  # noqa: E402

# Where there is a GPU, too: it refuses float32.
jax.config.update("jax_default_device", jax.devices("cpu")[0])


def arrays(dtype=jnp.float32, sq=61, sk=83, heads=4, heads_kv=2, d=24, dv=40):
    shapes = (2, sq, heads, d), (2, sk, heads_kv, d), (2, sk, heads_kv, dv)
    return [jax.random.normal(jax.random.key(i), s, dtype) for i, s in enumerate(shapes)]


def plain(q, k, v, slopes=None, sinks=None, causal=False):
    heads, sq, sk = q.shape[2], q.shape[1], k.shape[1]
    k, v = (jnp.repeat(x, heads // x.shape[2], 2) for x in (k, v))
    s = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1]).astype(q.dtype)
    diagonal, j = jnp.arange(sq)[:, None] + sk - sq, jnp.arange(sk)
    if slopes is not None:
        s = s - slopes[:, None, None] * abs(diagonal - j)
    if causal:
        s = jnp.where(j <= diagonal, s, -jnp.inf)
    every = s
    if sinks is not None:
        every = jnp.concatenate([s, jnp.broadcast_to(sinks[:, None, None], (*s.shape[:3], 1))], -1)
    lse = jax.nn.logsumexp(every, -1)
    return jnp.einsum("bhqk,bkhd->bqhd", jnp.exp(s - lse[..., None]), v), lse


def loss(function):
    def total(*args):
        o, lse = function(*args)
        weights = jnp.cos(jnp.arange(o.size)).reshape(o.shape)
        return (o * weights.astype(o.dtype)).sum().astype(jnp.float32) + (jnp.sin(lse) * 3).sum()

    return total


@pytest.mark.parametrize(
    ("dtype", "jit"), [(jnp.float32, False), (jnp.float32, True), (jnp.float16, True), (jnp.bfloat16, True)]
)
def test_values_and_gradients(dtype, jit):
    ours = lambda q, k, v: flashattn.attention(q, k, v, causal=True, return_lse=True)
    theirs = lambda q, k, v: plain(q, k, v, causal=True)
    wrap = jax.jit if jit else lambda f: f
    args = arrays(dtype)
    wide = [x.astype(jnp.float32) for x in args]
    results = []
    for function, inputs in ((wrap(ours), args), (theirs, wide), (theirs, args)):
        gradients = wrap(jax.grad(loss(function), argnums=(0, 1, 2)))(*inputs)
        results.append([*function(*inputs), *gradients])
    assert results[0][0].dtype == dtype and results[0][1].dtype == jnp.float32
    for name, got, exact, standard in zip(["o", "lse", "dq", "dk", "dv"], *results):
        got, exact, standard = (np.asarray(x, np.float64) for x in (got, exact, standard))
        floor = {4: 2**-17, 2: 2**-8 if dtype == jnp.bfloat16 else 2**-11}[jnp.dtype(dtype).itemsize]
        allowed = 2 * abs(standard - exact).max() + floor * max(1, abs(exact).max())
        assert abs(got - exact).max() <= allowed, name


def test_learned_extras():
    q, k, v = arrays()
    slopes, sinks = jnp.linspace(0.1, 0.4, 4), jnp.array([0.5, -1.0, 2.0, 0.0])
    ours = lambda q, k, v, a, s: flashattn.attention(q, k, v, alibi_slopes=a, sinks=s, return_lse=True)
    got = jax.jit(jax.grad(loss(ours), argnums=range(5)))(q, k, v, slopes, sinks)
    expected = jax.grad(loss(plain), argnums=range(5))(q, k, v, slopes, sinks)
    for a, b in zip(got, expected):
        np.testing.assert_allclose(a, b, atol=2e-5 * abs(b).max())


def test_score_mods():
    q, k, v = arrays()
    bias = jax.random.normal(jax.random.key(9), (4, 61, 83))

    def ours(q, k, v, bias):
        table = flashattn.Table(bias)
        return flashattn.attention(q, k, v, score_mod=lambda s, b, h, q, k: s + table[h, q, k], return_lse=True)

    def theirs(q, k, v, bias):
        k, v = (jnp.repeat(x, 2, 2) for x in (k, v))
        s = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(24) + bias
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s, -1), v), jax.nn.logsumexp(s, -1)

    got = jax.jit(jax.grad(loss(ours), argnums=range(4)))(q, k, v, bias)
    expected = jax.grad(loss(theirs), argnums=range(4))(q, k, v, bias)
    for a, b in zip(got, expected):
        np.testing.assert_allclose(a, b, atol=2e-5 * abs(b).max())


def test_drop_ins():
    q, k, v = arrays(dv=24)
    o, lse, none = flashattn.flash_attn_func(q, k, v, causal=True, window_size=(20, 0), return_attn_probs=True)
    assert isinstance(o, jax.Array) and lse.shape == (2, 4, 61) and none is None
    as_numpy = [np.asarray(x) for x in (q, k, v)]
    assert np.array_equal(o, flashattn.flash_attn_func(*as_numpy, causal=True, window_size=(20, 0)))
    cu_q, cu_k = jnp.array([0, 20, 61]), jnp.array([0, 50, 83])
    packed = jax.jit(flashattn.flash_attn_varlen_func, static_argnums=(5, 6))(q[0], k[0], v[0], cu_q, cu_k, 41, 50)
    first = flashattn.flash_attn_func(q[:1, :20], k[:1, :50], v[:1, :50])
    np.testing.assert_allclose(packed[:20], first[0], atol=1e-6)
    x = [jnp.swapaxes(x, 1, 2) for x in (q, k, v)]
    flex = flashattn.flex_attention(*x, enable_gqa=True)
    np.testing.assert_allclose(jnp.swapaxes(flex, 1, 2), flashattn.flash_attn_func(q, k, v), atol=1e-6)


def test_dropout_by_keys():
    q, k, v = arrays()
    run = jax.jit(lambda q, seed: flashattn.attention(q, k, v, dropout_p=0.3, seed=seed))
    key = jax.random.key(3)
    assert jnp.array_equal(run(q, key), run(q, key))
    assert not jnp.array_equal(run(q, key), run(q, jax.random.key(4)))
    seed = 123 << 32 | 456
    as_numpy = [np.asarray(x) for x in (q, k, v)]
    expected = flashattn.attention(*as_numpy, dropout_p=0.3, seed=seed)
    assert np.array_equal(flashattn.attention(q, k, v, dropout_p=0.3, seed=seed), expected)


def test_vmap():
    q, k, v = (x[None].repeat(3, 0) for x in arrays())
    o = jax.vmap(lambda q, k, v: flashattn.flash_attn_func(q, k, v, causal=True))(q, k, v)
    assert jnp.array_equal(o[2], flashattn.flash_attn_func(q[0], k[0], v[0], causal=True))


def test_errors():
    q, k, v = arrays()
    with pytest.raises(TypeError, match="q is int32"):
        flashattn.flash_attn_func(q.astype(jnp.int32), k, v)
    with pytest.raises(ValueError, match="expected a multiple of the 2"):
        jax.jit(flashattn.flash_attn_func)(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match="needs a seed"):
        flashattn.flash_attn_func(q, k, v, 0.1)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"ALiBi slopes has shape \[3\], expected \[heads_q = 4\]"):
        flashattn.flash_attn_func(q, k, v, alibi_slopes=jnp.ones(3)).block_until_ready()


@pytest.fixture
def gpu():
    try:
        return jax.devices("gpu")[0]
    except RuntimeError as error:
        pytest.skip(f"this jaxlib has no GPU: {error}")


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize(("sq", "heads"), [(61, 2), (301, 4)])
def test_on_a_gpu(gpu, dtype, sq, heads):
    """Values and gradients, those of tables and sinks too; with working memory of the plan's, and of XLA's for 301 queries."""
    args = arrays(dtype, sq=sq, heads=heads, d=64, dv=64)
    slopes, sinks = jnp.linspace(0.1, 0.4, heads), jnp.array([0.5, -1.0, 2.0, 0.0])[:heads]
    options = dict(causal=True, return_lse=True)
    ours = lambda q, k, v, a, s: flashattn.attention(q, k, v, alibi_slopes=a, sinks=s, **options)
    theirs = lambda q, k, v, a, s: tuple(
        x.astype(y) for x, y in zip(plain(q, k, v, a.astype(q.dtype), s.astype(q.dtype), True), (q.dtype, jnp.float32))
    )
    learned = (*args, slopes, sinks)
    wide = tuple(x.astype(jnp.float32) for x in learned)
    results = []
    for function, inputs in ((ours, jax.device_put(learned, gpu)), (theirs, wide), (theirs, learned)):
        gradients = jax.jit(jax.grad(loss(function), argnums=range(5)))(*inputs)
        results.append([*jax.jit(function)(*inputs), *gradients])
    assert all(x.devices() == {gpu} for x in results[0])
    for name, got, exact, standard in zip(["o", "lse", "dq", "dk", "dv", "slopes", "sinks"], *results):
        got, exact, standard = (np.asarray(x, np.float64) for x in (got, exact, standard))
        floor = (2**-8 if dtype == jnp.bfloat16 else 2**-11) * max(1, abs(exact).max())
        assert abs(got - exact).max() <= 2 * abs(standard - exact).max() + floor, name


@pytest.mark.cuda
def test_what_a_gpu_refuses(gpu):
    q, k, v = jax.device_put(arrays(), gpu)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"UNIMPLEMENTED.*dtype: f32"):
        jax.block_until_ready(flashattn.flash_attn_func(q, k, v))
    q, k, v = (x.astype(jnp.bfloat16) for x in arrays(d=264, dv=24))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"UNIMPLEMENTED.*head dimension: head_dim 264"):
        jax.block_until_ready(flashattn.flash_attn_func(*jax.device_put((q, k, v), gpu)))


@pytest.mark.cuda
def test_deterministic_on_a_gpu(gpu):
    """The same bits in every run, those of tables too."""
    args = [*arrays(jnp.bfloat16, sq=700, sk=900, d=64, dv=64), jnp.linspace(0.1, 0.4, 4)]

    def function(q, k, v, slopes):
        return flashattn.attention(q, k, v, alibi_slopes=slopes, causal=True, return_lse=True, deterministic=True)

    gradient = jax.jit(jax.grad(loss(function), argnums=range(4)))
    inputs = jax.device_put(args, gpu)
    first = gradient(*inputs)
    assert abs(first[3]).min() > 0
    for _ in range(10):
        assert all(jnp.array_equal(a, b) for a, b in zip(first, gradient(*inputs)))
