"""Every kernel compiles for every chip, fits its shared memory, and where it must does not spill.

The launchers themselves are run, on CPU tensors, so what is compiled is what a GPU would be given.
By default the configurations of GPT-2 and its like, bfloat16 with head dims 64 and 128, with and
without dropout, are compiled for every chip, and each chip has its share of the other choices;
--every-configuration compiles all choices for all chips, in an hour or more.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import triton

from fastgpt.ops.backend import INTERPRET
from tests.conftest import HAS_CUDA, all_kernels

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(HAS_CUDA or INTERPRET, reason="compiles on CPU tensors, without a driver"),
]

from fastgpt.kernels.adamw import adamw as step_adamw  # noqa: E402
from fastgpt.kernels.attention import attention_fwd  # noqa: E402
from fastgpt.kernels.attention_bwd import attention_bwd  # noqa: E402
from fastgpt.kernels.attention_decode import attention_decode  # noqa: E402
from fastgpt.kernels.cross_entropy import (  # noqa: E402
    cross_entropy_both,
    cross_entropy_bwd,
    cross_entropy_fwd,
)
from fastgpt.kernels.embedding import embedding_bwd, embedding_fwd  # noqa: E402
from fastgpt.kernels.ffn import WIDEST_FUSED, ffn_bwd, ffn_fwd  # noqa: E402
from fastgpt.kernels.layer_norm import layer_norm_bwd, layer_norm_fwd  # noqa: E402
from fastgpt.kernels.quantized_linear import dequantize, quantized_linear_fwd  # noqa: E402
from fastgpt.kernels.rms_norm import rms_norm_bwd, rms_norm_fwd  # noqa: E402
from fastgpt.kernels.rotary import rotary_fwd, rotary_norm_bwd  # noqa: E402
from fastgpt.lab.cases import EXTRAS, attention_extras, refused  # noqa: E402
from fastgpt.lab.chips import TARGETS, chip  # noqa: E402
from fastgpt.lab.compile import Kernel, offline  # noqa: E402
from fastgpt.ops.ffn import ACTIVATIONS  # noqa: E402

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (8, 16, 24, 32, 40, 80, 136, 256)  # each padded width, filled and not
CHIPS = tuple(target for target in TARGETS if refused(target) is None)
SEED = torch.zeros(1, dtype=torch.int64)
Launch = Callable[[], Any]


def attention(
    D: int, dtype: torch.dtype, p: float, lse: bool = False, with_: Sequence[str] = ()
) -> Launch:
    extras = attention_extras(1, 128, 4, dtype, with_)
    grads = {"bias_grad": True} if "bias" in extras else {}

    def launch() -> None:
        qkv = torch.empty(1, 128, 3, 4, D, dtype=dtype)
        q, k, v = qkv.unbind(2)
        seed = SEED if p else None
        o, l = attention_fwd(q, k, v, D**-0.5, -1, 0, p, seed, **extras)
        dl = l if lse else None
        attention_bwd(q, dl, q, k, v, o, l, D**-0.5, -1, 0, p, seed, **extras, **grads)

    return launch


def decode(
    D: int, dtype: torch.dtype, groups: int = 1, T: int = 1, options: bool = False,
    held: bool = False,
) -> Launch:  # fmt: skip
    """options: pages, a window and a softcap; held: the new ones are in the cache already."""

    def launch() -> None:
        q = torch.empty(2, T, 2 * groups, D, dtype=dtype)
        cache = torch.empty(2, 256, 2, D, dtype=dtype)
        lengths, new, table = torch.zeros(2, dtype=torch.int32), cache[:, :T], None
        if options:
            cache, table = cache.view(32, 16, 2, D), torch.zeros(2, 16, dtype=torch.int32)
        how = (100, 30.0) if options else (-1, 0.0)
        k = None if held else new
        attention_decode(q, cache, cache, lengths, k, k, table, 0.1, *how, 4)

    return launch


def layer_norm(
    N: int, dtype: torch.dtype, stream: torch.dtype, residual: bool, bias: bool, p: float
) -> Launch:
    def launch() -> None:
        x, w = torch.empty(64, N, dtype=dtype), torch.empty(N, dtype=stream)
        res = torch.empty(64, N, dtype=stream) if residual else None
        b = w if bias else None
        x_bias = torch.empty(N, dtype=dtype) if residual and bias else None
        _, h, mean, rstd = layer_norm_fwd(x, res, w, b, 1e-5, p, SEED if p else None, x_bias)
        h = h if residual else x
        dh = h if residual else None
        layer_norm_bwd(
            x, dh, h, w, bias, mean, rstd, p, SEED if p else None, dtype,
            None if x_bias is None else dtype,
        )  # fmt: skip

    return launch


def rms_norm(N: int, dtype: torch.dtype, stream: torch.dtype, residual: bool, p: float) -> Launch:
    def launch() -> None:
        x, w = torch.empty(64, N, dtype=dtype), torch.empty(N, dtype=stream)
        res = torch.empty(64, N, dtype=stream) if residual else None
        _, h, rstd = rms_norm_fwd(x, res, w, 1e-6, p, SEED if p else None)
        h = h if residual else x
        rms_norm_bwd(x, h if residual else None, h, w, rstd, p, SEED if p else None, dtype)

    return launch


def embedding(C: int, dtype: torch.dtype, ids: torch.dtype, wpe: bool, p: float) -> Launch:
    def launch() -> None:
        idx, wte = torch.zeros(128, 8, dtype=ids), torch.empty(100, C, dtype=dtype)
        pos, seed = wte[:16] if wpe else None, SEED if p else None
        h = embedding_fwd(idx, wte, pos, 0, p, seed)
        embedding_bwd(h, idx, 100, 16 if wpe else 0, 0, p, seed)

    return launch


def ffn(
    C: int, dtype: torch.dtype, activation: str, recompute: int, bias: bool, gated: bool,
    turned: bool = False,
) -> Launch:  # fmt: skip
    """turned: the weights lie in memory as (in, out)."""

    def launch() -> None:
        x, w1, w2 = (torch.empty(s, dtype=dtype) for s in ((256, C), (512, C), (C, 512)))
        if turned:
            w1, w2 = w1.view(C, 512).T, w2.view(512, C).T
        b1 = torch.empty(512, dtype=dtype) if bias else None
        v, c = (torch.empty_like(w1), b1) if gated else (None, None)
        y, pre, h = ffn_fwd(x, w1, b1, w2, None, v, c, activation, recompute < 2, recompute < 1)
        needs = [True, True, bias, True, False, gated, gated and bias]
        ffn_bwd(y, x, w1, b1, w2, v, c, pre, h, activation, needs)
        ffn_fwd(x, w1, b1, w2, None, v, c, activation, False, False)

    return launch


def cross_entropy(V: int, dtype: torch.dtype, options: bool) -> Launch:
    def launch() -> None:
        logits, target = torch.empty(8, V, dtype=dtype), torch.zeros(8, dtype=torch.int64)
        how = (-100, 0.1, 1e-4, 30.0) if options else (-100, 0.0, 0.0, 0.0)
        losses, stats = cross_entropy_fwd(logits, target, how)
        cross_entropy_bwd(losses, logits, target, stats, how, torch.empty_like(logits))
        cross_entropy_both(logits, target, how, losses)

    return launch


def adamw(
    dtype: torch.dtype, N: int = 16384, low: torch.dtype | None = None, stochastic: bool = False
) -> Launch:
    def launch() -> None:
        p, m, v = (torch.empty(N, dtype=d) for d in (dtype, torch.float32, torch.float32))
        step_adamw(
            [p], [p], [m], [v], [torch.empty(())], [] if low is None else [p.to(low)], [],
            [1e-3, 0.9, 0.95, 1e-8, 0.1], [0], torch.empty(4), None, None, 1.0, True,
            SEED if stochastic else None,
        )  # fmt: skip

    return launch


def quantized_linear(
    M: int, K: int, dtype: torch.dtype, bits: int, group: int = 0, activation: str = "none",
    N: int = 2304,
) -> Launch:  # fmt: skip
    def launch() -> None:
        w = torch.empty(N, K * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8)
        shape = (N,) if group == 0 else (N, K // group, 2)[: 3 if bits == 4 else 2]
        scale = torch.empty(shape, dtype=torch.float32 if bits == 8 else torch.bfloat16)
        x = torch.empty(M, K, dtype=dtype)
        quantized_linear_fwd(x, w, scale, torch.empty(N, dtype=dtype), activation)
        if M == 1:
            dequantize(w, scale, dtype)

    return launch


def rotary(D: int, R: int, dtype: torch.dtype, norm: bool, interleaved: bool) -> Launch:
    def launch() -> None:
        q, k, _ = torch.empty(2, 64, 24, D, dtype=dtype).split([16, 4, 4], 2)
        cos, sin = (torch.empty(64, R // 2) for _ in range(2))
        w = torch.empty(D, dtype=dtype) if norm else None
        yq, yk = rotary_fwd(q, k, cos, sin, w, w, 1e-6, interleaved, not norm)
        if w is not None:
            rotary_norm_bwd(yq, yk, q, k, cos, sin, w, w, 1e-6, interleaved)

    return launch


def configurations(target: str, every: bool) -> Iterator[Launch]:
    """What GPT-2 runs on, and all other choices or this chip's share of them."""
    for D, p in itertools.product((64, 128), (0.0, 0.1)):
        yield attention(D, torch.bfloat16, p, lse=p > 0)
    yield decode(128, torch.bfloat16, groups=4)
    near = [
        attention(D, dtype, p, lse=p > 0)
        for D, dtype, p in itertools.product((64, 128), DTYPES[1:], (0.0, 0.1))
    ]
    extras = [(f,) for f in EXTRAS]
    near += [
        attention(D, torch.bfloat16, p, with_=with_)
        for D, p, with_ in itertools.product((64, 128), (0.0, 0.1), extras)
    ]
    dtypes = [(d, d) for d in DTYPES] + [(d, torch.float32) for d in DTYPES[:2]]
    flags = [(r, p, b) for r, p in ((False, 0.0), (True, 0.0), (True, 0.1)) for b in (True, False)]
    far = [
        *(adamw(dtype, N) for dtype, N in itertools.product(DTYPES, (16384, 16381))),
        *(adamw(torch.float32, low=low) for low in DTYPES[:2]),
        adamw(torch.bfloat16, stochastic=True),
        *(
            attention(D, dtype, p, lse=p > 0)
            for D, dtype, p in itertools.product(HEAD_DIMS, DTYPES, (0.0, 0.1))
        ),
        *(
            decode(D, dtype, groups, T, options, held)
            for D, dtype, (groups, T), (options, held) in itertools.product(
                (64, 128, 256, 80),
                DTYPES,
                ((1, 1), (4, 1), (8, 8)),
                ((True, False), (False, True)),
            )
        ),
        *(
            layer_norm(N, dtype, stream, residual, bias, p)
            for (dtype, stream), N in itertools.product(dtypes, (768, 1024, 1600, 4096, 16385))
            for residual, p, bias in flags
        ),
        *(
            layer_norm(2**i, dtype, stream, True, True, 0.1)
            for (dtype, stream), i in itertools.product(dtypes, range(14))
        ),
        *(
            rms_norm(N, dtype, stream, residual, p)
            for (dtype, stream), N in itertools.product(dtypes, (576, 4096, 8193))
            for residual, p in ((False, 0.0), (True, 0.1))
        ),
        *(
            embedding(C, dtype, ids, wpe, p)
            for C, dtype, ids, wpe, p in itertools.product(
                (768, 100), DTYPES, (torch.int64, torch.int32), (True, False), (0.0, 0.1)
            )
        ),
        *(
            ffn(C, dtype, activation, recompute, bias, gated)
            for C, dtype, activation, recompute, bias, gated in itertools.product(
                (768, 770, WIDEST_FUSED + 8),
                DTYPES,
                ACTIVATIONS,
                (0, 1),
                (True, False),
                (True, False),
            )
        ),
        *(
            ffn(C, dtype, "gelu_tanh", recompute, True, False, turned=True)
            for C, dtype, recompute in itertools.product((768, 770, 1600), DTYPES, (0, 1))
        ),
        *(
            quantized_linear(M, K, dtype, bits, group, activation)
            for M, dtype, (K, bits, group), activation in itertools.product(
                (1, 8, 32, 128),
                DTYPES,
                (
                    (768, 8, 0),
                    (770, 8, 0),
                    (784, 8, 0),
                    (768, 8, 16),
                    (768, 8, 128),
                    (768, 4, 32),
                    (768, 4, 64),
                ),
                ("none", "gelu_tanh"),
            )
        ),
        *(
            cross_entropy(V, dtype, options)
            for V, dtype, options in itertools.product(
                (100, 32000, 50257, 50304, 131072), DTYPES, (True, False)
            )
        ),
        *(
            rotary(D, R, dtype, norm, interleaved)
            for (D, R), dtype, norm, interleaved in itertools.product(
                ((64, 64), (128, 128), (80, 32), (256, 64)), DTYPES, (True, False), (True, False)
            )
        ),
    ]
    share = CHIPS.index(target)
    yield from near if every else near[share % 8 :: 8]
    yield from far if every else far[share :: 6 * len(CHIPS)]


def check(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        got = kernel.resources()
        assert got.shared <= chip(kernel.target).shared_limit, f"{kernel}: {got}"
        pinned = triton.__version__.startswith("3.7.")  # spills move from release to release
        flags = kernel.constexprs
        promised = flags.get("BLOCK_D", 64) in (64, 128) and not flags.get("PAD_D", False)
        if pinned and kernel.target in ("sm_80", "sm_90", "sm_100") and promised:
            assert got.spills == 0, f"{kernel}: {got}"


@pytest.mark.parametrize("target", CHIPS)
def test_every_kernel_compiles(target: str) -> None:
    with offline(target) as kernels:
        for launch in (
            attention(64, torch.bfloat16, 0.0),
            attention(64, torch.bfloat16, 0.0, with_=("bias", "document_ids")),
            decode(64, torch.bfloat16),
            layer_norm(768, torch.bfloat16, torch.float32, True, True, 0.1),
            layer_norm(16385, torch.bfloat16, torch.bfloat16, False, True, 0.0),
            rms_norm(576, torch.bfloat16, torch.bfloat16, True, 0.0),
            rms_norm(16385, torch.bfloat16, torch.bfloat16, True, 0.0),
            embedding(768, torch.bfloat16, torch.int64, True, 0.1),
            adamw(torch.float32, low=torch.bfloat16),
            cross_entropy(50257, torch.bfloat16, False),
            ffn(768, torch.bfloat16, "gelu_tanh", 1, True, False),
            ffn(768, torch.bfloat16, "gelu_tanh", 1, True, False, turned=True),
            ffn(768, torch.bfloat16, "silu", 2, False, True),
            ffn(WIDEST_FUSED + 8, torch.bfloat16, "gelu_tanh", 1, True, False),
            quantized_linear(1, 768, torch.bfloat16, 8),
            quantized_linear(1, 768, torch.bfloat16, 4, 32),
            quantized_linear(8, 3072, torch.bfloat16, 8, N=768),
            quantized_linear(32, 768, torch.bfloat16, 4, 32, "gelu_tanh"),
            quantized_linear(512, 768, torch.bfloat16, 8),
            quantized_linear(512, 768, torch.bfloat16, 4, 32),
            rotary(64, 64, torch.bfloat16, True, False),
            rotary(128, 128, torch.bfloat16, True, False),
        ):
            launch()
    assert {k.name for k in kernels} == all_kernels()
    check(kernels)


@pytest.mark.parametrize("target", CHIPS)
@pytest.mark.parametrize("part", range(4))
def test_every_configuration_compiles(target: str, part: int, pytestconfig: pytest.Config) -> None:
    every = pytestconfig.getoption("--every-configuration")
    with offline(target) as kernels:
        for launch in list(configurations(target, every))[part::4]:
            launch()
    assert kernels
    check(kernels)


def test_three_sizes_compile_once() -> None:
    with offline("sm_90") as kernels:
        for T in (96, 128, 608):
            q = torch.empty(T // 32, T, 4, 64, dtype=torch.bfloat16)
            o, lse = attention_fwd(q, q, q, 0.1, -1, 0, 0.0, None)
            attention_bwd(o, None, q, q, q, o, lse, 0.1, -1, 0, 0.0, None)
            x = torch.empty(T, 768, dtype=torch.bfloat16)
            idx = torch.zeros(T, T // 8, dtype=torch.int64)
            embedding_bwd(embedding_fwd(idx, x, x, 3, 0.0, None), idx, T, T, 3, 0.0, None)
            w, f = torch.empty(768, dtype=x.dtype), torch.empty(3072, 768, dtype=x.dtype)
            _, _, mean, rstd = layer_norm_fwd(x, None, w, w, 1e-5, 0.0, None)
            layer_norm_bwd(x, None, x, w, True, mean, rstd, 0.0, None, x.dtype)
            adamw(torch.float32, T * 768)()
            target, how = torch.zeros(T, dtype=torch.int64), (-100, 0.0, 0.0, 0.0)
            losses, stats = cross_entropy_fwd(x, target, how)
            cross_entropy_bwd(losses, x, target, stats, how, torch.empty_like(x))
            cross_entropy_both(x, target, how, losses)
            y, pre, h = ffn_fwd(x, f, None, f.T, None, None, None, "gelu", True, False)
            needs = [True] * 5 + [False] * 2
            ffn_bwd(y, x, f, None, f.T.contiguous(), None, None, pre, h, "gelu", needs)
            ends = torch.zeros(T // 32, dtype=torch.int32)
            few = T // 48
            attention_decode(q[:, :few], q, q, ends, None, None, None, 0.1, T, 0.0, few)
            for M in (1, T):
                quantized_linear(M, 3072, x.dtype, 8)()
            cos = torch.empty(T, 32)
            rotary_fwd(q, q, cos, cos, None, None, 1e-6, False, False)
            rotary_norm_bwd(q, q, q, q, cos, cos, w[:64], w[:64], 1e-6, False)
    binaries: dict[str, set[str]] = {}
    for k in kernels:
        binaries.setdefault(k.name, set()).add(k.binary.hash)
    # Sums by id and by position are two kernels of one source.
    # Programs share a tile of few rows and not of many.
    two = {
        "quantized_linear._rows_kernel": 2,
        "embedding._chunk_sum_kernel": 2,
        "embedding._segment_sum_kernel": 2,
    }
    once = dict.fromkeys(binaries, 1)
    assert {name: len(hashes) for name, hashes in binaries.items()} == once | two


@pytest.mark.parametrize("with_", [EXTRAS[:-1], EXTRAS[-1:]], ids="+".join)
def test_three_sizes_of_attention_with_extras_compile_once(with_: Sequence[str]) -> None:
    with offline("sm_90") as kernels:
        for T in (96, 128, 608):
            B = T // 32
            q = torch.empty(B, T, 4, 64, dtype=torch.bfloat16)
            q = q.flatten(0, 1)[None] if "cu_seqlens" in with_ else q
            extras = attention_extras(B, T, 4, q.dtype, with_)
            grads = {"bias_grad": "bias" in extras}
            o, lse = attention_fwd(q, q, q, 0.1, -1, 0, 0.0, None, **extras)
            attention_bwd(o, None, q, q, q, o, lse, 0.1, -1, 0, 0.0, None, **extras, **grads)
    binaries: dict[str, set[str]] = {}
    for k in kernels:
        binaries.setdefault(k.name, set()).add(k.binary.hash)
    masks = binaries.pop("attention._ends_kernel", set())  # of bytes and of int64
    assert len(masks) == (2 if "key_mask" in with_ else 0)
    assert {name: len(hashes) for name, hashes in binaries.items()} == dict.fromkeys(binaries, 1)


def test_no_product_spills_into_integer_or_double_arithmetic() -> None:
    """No float64 in the PTX: a Python float that reached a kernel as a double would show."""
    with offline("sm_90") as kernels:
        attention(64, torch.bfloat16, 0.1)()
        layer_norm(768, torch.bfloat16, torch.float32, True, True, 0.1)()
        adamw(torch.bfloat16, stochastic=True)()
        ffn(768, torch.bfloat16, "gelu", 1, True, False)()
        rotary(64, 64, torch.bfloat16, True, False)()
        decode(64, torch.bfloat16, options=True)()
    for k in kernels:
        assert ".f64" not in k.binary.asm["ptx"], k


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(ValueError, match="got 'sm_42'"), offline("sm_42"):
        attention(64, torch.bfloat16, 0.0)()
