"""fastgpt's own kernels as the lab sees them: what the ops launch, forward and backward.

An op is named as in `fastgpt.ops`, with sizes if others are wanted than GPT-2's:
"attention", "attention:D=128,dropout_p=0.1", "layer_norm:N=4096", "ffn:C=1024"; or one kernel of
it, "attention._dq_kernel:D=128". What attention takes beyond q, k and v is joined by a plus:
"attention:extras=softcap+key_mask".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fastgpt.lab.compile import capture
from fastgpt.lab.launch import DTYPES, Launch
from fastgpt.lab.spec import elements
from fastgpt.ops.backend import OLDEST

Sizes = dict[str, Any]


EXTRAS = ("softcap", "alibi_slopes", "bias", "key_mask", "document_ids", "cu_seqlens")


def attention_extras(
    B: int, T: int, H: int, dtype: torch.dtype, names: Sequence[str]
) -> dict[str, Any]:
    """What attention takes beyond q, k and v, by name; with cu_seqlens B is the sequences.

    Raises:
        ValueError: attention takes nothing of that name.
    """
    if unknown := set(names) - set(EXTRAS):
        raise ValueError(f"lab: attention's extras are {', '.join(EXTRAS)}; got {unknown.pop()!r}")
    cu_seqlens = torch.zeros(B + 1, dtype=torch.int32)
    made = {
        "softcap": 30.0,
        "alibi_slopes": torch.zeros(H),
        "bias": torch.zeros(1, H, T, T, dtype=dtype),
        "key_mask": torch.ones(B, T, dtype=torch.bool),
        "document_ids": torch.zeros(B, T, dtype=torch.int64),
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens,
        "max_seqlen_q": T,
        "max_seqlen_k": T,
    }
    cut = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return {n: t for n, t in made.items() if (n in cut and "cu_seqlens" in names) or n in names}


def _attention(s: Sizes) -> None:
    from fastgpt.kernels.attention import attention_fwd
    from fastgpt.kernels.attention_bwd import attention_bwd

    B, T, H, D, p = s["B"], s["T"], s["H"], s["D"], s["dropout_p"]
    dtype = DTYPES[s["dtype"]]
    names = [n for n in s["extras"].split("+") if n]
    extras = attention_extras(B, T, H, dtype, names)
    qkv = torch.empty(B, T, 3, H, D, dtype=dtype)
    if "cu_seqlens" in names:
        qkv = qkv.flatten(0, 1)[None]
    q, k, v = qkv.unbind(2)
    seed = torch.zeros(1, dtype=torch.int64) if p else None
    o, lse = attention_fwd(q, k, v, D**-0.5, -1, 0, p, seed, **extras)
    bias = "bias" in extras
    attention_bwd(o, None, q, k, v, o, lse, D**-0.5, -1, 0, p, seed, **extras, bias_grad=bias)


def _attention_decode(s: Sizes) -> None:
    from fastgpt.kernels.attention_decode import attention_decode

    B, T, S, G, D, page = (s[n] for n in ("B", "T", "S", "Hkv", "D", "page"))
    dtype = DTYPES[s["dtype"]]
    q, new = (torch.empty(B, T, h, D, dtype=dtype) for h in (s["H"], G))
    shape = (B * (S // page), page, G, D) if page else (B, S, G, D)
    keys, values = (torch.empty(shape, dtype=dtype) for _ in "kv")
    # How far a program goes, and where, is data: rows are full once the new ones are in.
    lengths = torch.full((B,), S - T, dtype=torch.int32, device="cpu")
    table = None
    if page:
        table = torch.arange(B * (S // page), dtype=torch.int32, device="cpu").view(B, -1)
    attention_decode(
        q, keys, values, lengths, new, new, table, D**-0.5, -1, s["softcap"], s["splits"]
    )


def _layer_norm(s: Sizes) -> None:
    from fastgpt.kernels.layer_norm import layer_norm_bwd, layer_norm_fwd

    M, N, p, dtype = s["M"], s["N"], s["dropout_p"], DTYPES[s["dtype"]]
    x = torch.empty(M, N, dtype=dtype)
    res = torch.empty(M, N, dtype=dtype) if s["residual"] else None
    weight = torch.empty(N, dtype=torch.float32)
    x_bias = torch.empty(N, dtype=dtype) if s["x_bias"] else None
    seed = torch.zeros(1, dtype=torch.int64) if p else None
    _, h, mean, rstd = layer_norm_fwd(x, res, weight, weight, 1e-5, p, seed, x_bias)
    dh, h = (h, h) if s["residual"] else (None, x)
    xb_dtype = None if x_bias is None else x_bias.dtype
    layer_norm_bwd(x, dh, h, weight, True, mean, rstd, p, seed, dtype, xb_dtype)


def _rms_norm(s: Sizes) -> None:
    from fastgpt.kernels.rms_norm import rms_norm_bwd, rms_norm_fwd

    M, N, p, dtype = s["M"], s["N"], s["dropout_p"], DTYPES[s["dtype"]]
    x = torch.empty(M, N, dtype=dtype)
    res = torch.empty(M, N, dtype=dtype) if s["residual"] else None
    weight = torch.empty(N, dtype=torch.float32)
    x_bias = torch.empty(N, dtype=dtype) if s["x_bias"] else None
    seed = torch.zeros(1, dtype=torch.int64) if p else None
    _, h, rstd = rms_norm_fwd(x, res, weight, 1e-6, p, seed, x_bias)
    dh, h = (h, h) if s["residual"] else (None, x)
    xb_dtype = None if x_bias is None else x_bias.dtype
    rms_norm_bwd(x, dh, h, weight, rstd, p, seed, dtype, xb_dtype)


def _rotary(s: Sizes) -> None:
    from fastgpt.kernels.rotary import rotary_fwd, rotary_norm_bwd

    B, T, H, G, D = s["B"], s["T"], s["H"], s["Hkv"], s["D"]
    dtype, interleaved = DTYPES[s["dtype"]], s["layout"] == "interleaved"
    qkv = torch.empty(B, T, H + 2 * G, D, dtype=dtype)
    q, k, _ = qkv.split([H, G, G], 2)
    cos, sin = (torch.empty(T, D // 2) for _ in range(2))
    w = torch.empty(D, dtype=dtype)
    norm = w if s["norm"] == "rms" else None
    yq, yk = rotary_fwd(q, k, cos, sin, norm, norm, 1e-6, interleaved, False)
    if norm is not None:
        rotary_norm_bwd(yq, yk, q, k, cos, sin, w, w, 1e-6, interleaved)


def _ffn(s: Sizes) -> None:
    from fastgpt.kernels.ffn import ffn_bwd, ffn_fwd

    M, C, F, dtype = s["M"], s["C"], s["F"], DTYPES[s["dtype"]]
    x, w1, w2 = (torch.empty(shape, dtype=dtype) for shape in ((M, C), (F, C), (C, F)))
    b1 = torch.empty(F, dtype=dtype)
    gated = s["gate"] == "yes"
    v, c = (torch.empty_like(w1), b1) if gated else (None, None)
    y, pre, h = ffn_fwd(x, w1, b1, w2, None, v, c, s["activation"], True, s["save_h"] == "yes")
    needs = [True, True, True, True, False, gated, gated]
    ffn_bwd(y, x, w1, b1, w2, v, c, pre, h, s["activation"], needs)


def _quantized_linear(s: Sizes) -> None:
    from fastgpt.kernels.quantized_linear import dequantize, quantized_linear_fwd

    M, N, K, bits, group = s["M"], s["N"], s["K"], s["bits"], s["group"]
    dtype = DTYPES[s["dtype"]]
    weight = torch.empty(N, K * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8)
    if bits == 4:
        scale = torch.empty(N, K // (group or 32), 2, dtype=torch.bfloat16)
    else:
        scale = torch.empty((N, K // group) if group else (N,), dtype=torch.float32)
    bias = torch.empty(N, dtype=dtype)
    for rows in (1, M):
        quantized_linear_fwd(
            torch.empty(rows, K, dtype=dtype), weight, scale, bias, s["activation"]
        )
    dequantize(weight, scale, dtype)


def _adamw(s: Sizes) -> None:
    from fastgpt.kernels.adamw import adamw

    N, low = s["N"], s["low"]
    p, g = (torch.empty(N, dtype=DTYPES[s[name]]) for name in ("dtype", "grad"))
    m, v = (torch.empty(N, dtype=torch.float32) for _ in range(2))
    step, control = torch.empty((), dtype=torch.float32), torch.empty(4, dtype=torch.float32)
    copies = [torch.empty(N, dtype=DTYPES[low])] if low != "none" else []
    seed = torch.zeros(1, dtype=torch.int64) if s["stochastic"] else None
    adamw(
        [p], [g], [m], [v], [step], copies, [], [1e-3, 0.9, 0.95, 1e-8, 0.1], [0], control, None,
        None, 1.0, True, seed,
    )  # fmt: skip


def _embedding(s: Sizes) -> None:
    from fastgpt.kernels.embedding import embedding_bwd, embedding_fwd

    B, T, V, C, p = s["B"], s["T"], s["V"], s["C"], s["dropout_p"]
    # Addresses depend on the ids, so they are real ones.
    rng = torch.Generator().manual_seed(0)
    idx = torch.randint(V, (B, T), generator=rng, device="cpu")
    wte, wpe, dy = (torch.empty(n, C, dtype=DTYPES[s["dtype"]]) for n in (V, T, B * T))
    seed = torch.zeros(1, dtype=torch.int64) if p else None
    embedding_fwd(idx, wte, wpe, 0, p, seed)
    embedding_bwd(dy.view(B, T, C), idx, V, T, 0, p, seed)


def _cross_entropy(s: Sizes) -> None:
    from fastgpt.kernels.cross_entropy import cross_entropy_bwd, cross_entropy_fwd

    logits, target = (
        torch.empty(s["M"], s["V"], dtype=DTYPES[s["dtype"]]),
        torch.zeros(s["M"]).long(),
    )
    how = (-100, s["label_smoothing"], s["z_loss"], s["softcap"])
    losses, stats = cross_entropy_fwd(logits, target, how)
    cross_entropy_bwd(losses, logits, target, stats, how, torch.empty_like(logits))


def _linear_cross_entropy(s: Sizes) -> None:
    from fastgpt.kernels.linear_cross_entropy import linear_cross_entropy_fwd
    from fastgpt.ops.linear_cross_entropy import GPU_BUDGET, chunk_rows

    M, C, V, dtype = s["M"], s["C"], s["V"], DTYPES[s["dtype"]]
    x, weight, target = (
        torch.empty(M, C, dtype=dtype),
        torch.empty(V, C, dtype=dtype),
        torch.zeros(M),
    )
    how = (-100, s["label_smoothing"], s["z_loss"], s["softcap"])
    chunk = chunk_rows(M, V, dtype.itemsize, GPU_BUDGET)
    linear_cross_entropy_fwd(x, weight, None, target.long(), how, chunk, [True, True, False])


@dataclass(frozen=True)
class Case:
    """An op: what launches its kernels, the sizes it takes, and smaller ones to run them on.

    Attributes:
        sizes: GPT-2's, for compiling; a name to its default.
        small: sizes at which the interpreter counts traffic in seconds, growing.
        elements: what a kernel works through, as under `elements` of a spec; expressions of the
            sizes, of `size`, the bytes of the dtype, and of the kernel's own numbers.
    """

    launch: Callable[[Sizes], None]
    sizes: Sizes
    small: tuple[Sizes, ...]
    elements: dict[str, dict[str, str]] = field(default_factory=dict)


_LOSS = {"label_smoothing": 0.0, "z_loss": 0.0, "softcap": 0.0}
_NORM = {
    "_fwd_kernel": {
        "launch": "M * N",
        "loop": "ROWS * N",
        "bytes": "size * (2 + 2 * HAS_RESIDUAL)",
    },
    "_fwd_wide_kernel": {
        "launch": "M * N",
        "loop": "N / cdiv(N, BLOCK_N)",
        "bytes": "size * (2 + 2 * HAS_RESIDUAL)",
    },
    "_bwd_kernel": {
        "launch": "M * N",
        "loop": "ROWS * N",
        "bytes": "size * (3 + HAS_DH + HAS_DRES)",
    },
    "_bwd_wide_sums_kernel": {
        "launch": "M * N",
        "loop": "N / cdiv(N, BLOCK_N)",
        "bytes": "size * 2",
    },
    "_bwd_wide_kernel": {
        "launch": "M * N",
        "loop": "N / cdiv(N, BLOCK_N)",
        "bytes": "size * (3 + HAS_DH + HAS_DRES)",
    },
}
OPS = {
    "layer_norm": Case(
        _layer_norm,
        {"M": 8192, "N": 768, "dtype": "bf16", "dropout_p": 0.0, "residual": 1, "x_bias": 0},
        tuple({"M": M, "N": 768} for M in (64, 128, 256)),
        _NORM,
    ),
    "rms_norm": Case(
        _rms_norm,
        {"M": 8192, "N": 576, "dtype": "bf16", "dropout_p": 0.0, "residual": 1, "x_bias": 0},
        tuple({"M": M, "N": 576} for M in (64, 128, 256)),
        _NORM,
    ),
    "embedding": Case(
        _embedding,
        {"B": 8, "T": 1024, "V": 50257, "C": 768, "dtype": "bf16", "dropout_p": 0.0},
        tuple({"B": 2, "T": T, "V": 16 * T, "C": 256} for T in (32, 64, 128)),
        {
            "_fwd_kernel": {
                "launch": "B * T * C",
                "loop": "ROWS * C / cdiv(C, BLOCK_C)",
                "bytes": "size * (2 + 1 / B)",
            },
            "_segment_sum_kernel": {"loop": "ROWS * C / cdiv(C, BLOCK_C)", "bytes": "size"},
        },
    ),
    "attention": Case(
        _attention,
        {"B": 8, "T": 1024, "H": 12, "D": 64, "dtype": "bf16", "dropout_p": 0.0, "extras": ""},
        tuple({"B": 1, "T": T, "H": 1} for T in (256, 512, 1024)),
        {
            name: {"loop": "BLOCK_M * BLOCK_N"}  # a score, and one exponential
            for name in ("_fwd_kernel", "_dkdv_kernel", "_dq_kernel")
        },
    ),
    "attention_decode": Case(
        _attention_decode,
        {
            "B": 8,
            "S": 1024,
            "T": 1,
            "H": 12,
            "Hkv": 12,
            "D": 64,
            "dtype": "bf16",
            "page": 0,
            "softcap": 0.0,
            "splits": 4,
        },
        tuple({"B": 1, "S": S, "H": 1, "Hkv": 1} for S in (256, 512, 1024)),
        {
            "_decode_kernel": {
                "launch": "B * Hkv * S * D",
                "loop": "BLOCK_N * D",
                "bytes": "2 * size",
            },
        },
    ),
    "rotary": Case(
        _rotary,
        {
            "B": 8,
            "T": 1024,
            "H": 12,
            "Hkv": 4,
            "D": 64,
            "dtype": "bf16",
            "norm": "rms",
            "layout": "halves",
        },
        tuple({"B": 1, "T": T} for T in (32, 64, 128)),
    ),
    "ffn": Case(
        _ffn,
        {
            "M": 8192,
            "C": 768,
            "F": 3072,
            "dtype": "bf16",
            "activation": "gelu_tanh",
            "gate": "no",
            "save_h": "yes",
        },
        tuple({"M": M, "C": 256, "F": 512} for M in (128, 256, 512)),
        {
            "_act_kernel": {"launch": "M * F", "bytes": "size * (2 + GATED)"},
            "_act_grad_kernel": {
                "launch": "M * F",
                "loop": "BLOCK_M * BLOCK_N",
                "bytes": "size * (3 + SAVE_H + 2 * GATED)",
            },
        },
    ),
    "quantized_linear": Case(
        _quantized_linear,
        {
            "M": 8,
            "N": 768,
            "K": 3072,
            "bits": 8,
            "group": 0,
            "dtype": "bf16",
            "activation": "none",
        },
        tuple({"N": N, "K": 256} for N in (64, 128, 256)),
        {
            "_row_kernel": {
                "launch": "N * K",
                "loop": "ROWS * LANES * 128 / BITS",
                "bytes": "BITS / 8",
            },
            "_rows_kernel": {"launch": "N * K", "loop": "BLOCK_N * BLOCK_K", "bytes": "BITS / 8"},
            "_unpack_kernel": {"launch": "N * K", "bytes": "BITS / 8 + size"},
        },
    ),
    "cross_entropy": Case(
        _cross_entropy,
        {"M": 8192, "V": 50257, "dtype": "bf16", **_LOSS},
        tuple({"M": M, "V": 50257} for M in (2, 4, 8)),
        {
            "_fwd_kernel": {"launch": "M * V", "loop": "BLOCK", "bytes": "size"},
            "_bwd_kernel": {"launch": "M * V", "loop": "BLOCK", "bytes": "size * 2"},
        },
    ),
    "linear_cross_entropy": Case(
        _linear_cross_entropy,
        {"M": 8192, "C": 768, "V": 50257, "dtype": "bf16", **_LOSS},
        tuple({"M": M, "C": 64, "V": 50257} for M in (2, 4, 8)),
        # the row is read once more, from a cache or not
        {"_both_kernel": {"launch": "M * V", "loop": "BLOCK", "bytes": "size * 2"}},
    ),
    "adamw": Case(
        _adamw,
        {"N": 768 * 3072, "dtype": "f32", "grad": "f32", "low": "none", "stochastic": 0},
        tuple({"N": N} for N in (16384, 32768, 65536)),
        {
            "_norm_kernel": {"launch": "N", "loop": "LANES", "bytes": "size"},
            "_step_kernel": {
                "launch": "N",
                "loop": "LANES",
                "bytes": "size * 3 + 16 + 2 * HAS_LOW",
            },
        },
    ),
}


def refused(target: str) -> str | None:
    """Why fastgpt's kernels do not run on a target, if so."""
    if target.startswith("sm_") and divmod(int(target[3:]), 10) < OLDEST:
        return f"fastgpt's kernels need compute capability {OLDEST[0]}.{OLDEST[1]}"
    return None


def parse(said: str) -> tuple[str, Sizes]:
    """ "attention:D=128" as the op's name and its sizes.

    Raises:
        ValueError: there is no such op, or it has no such size.
    """
    name, _, rest = said.partition(":")
    name = name.partition(".")[0]
    if name not in OPS:
        raise ValueError(f"lab: fastgpt's ops are {', '.join(OPS)}; got {name!r}")
    sizes = dict(OPS[name].sizes)
    for pair in filter(None, rest.split(",")):
        key, equals, value = pair.partition("=")
        if key not in sizes or not equals:
            raise ValueError(f"lab: {name} takes {', '.join(sizes)}, as NAME=VALUE; got {pair!r}")
        try:
            sizes[key] = type(sizes[key])(value)
        except ValueError:
            kind = type(sizes[key]).__name__
            raise ValueError(f"lab: {name}:{key} must be {kind}; got {value!r}") from None
    if sizes["dtype"] not in ("bf16", "f16", "f32"):
        raise ValueError(f"lab: {name}:dtype must be bf16, f16 or f32; got {sizes['dtype']!r}")
    wrong = [
        f"{key}={n}"
        for key, n in sizes.items()
        if isinstance(n, int)
        and n < (key not in ("residual", "x_bias", "stochastic", "page", "group"))
    ]
    if wrong or not 0.0 <= sizes.get("dropout_p", 0.0) < 1.0:
        raise ValueError(
            f"lab: sizes of {name} must be at least 1 and dropout_p in [0, 1); got {rest}"
        )
    return name, sizes


def launches(said: str, target: str) -> list[Launch]:
    """What an op launches on a target, each kernel once.

    Raises:
        ValueError: there is no such op, or it has no such size.
    """
    return _once(said, {}, target)


def small_launches(said: str, target: str) -> list[Launch]:
    """The same at the small sizes, the tiles being those of the target."""
    name, _ = parse(said)
    made = []
    for small in OPS[name].small:
        label = ", ".join(f"{k}={v}" for k, v in small.items())
        made += [replace(one, size=label) for one in _once(said, small, target)]
    return made


def _counted(launch: Launch, case: Case, sizes: Sizes) -> Launch:
    """With what it works through, as far as the case says."""
    said = case.elements.get(launch.name.partition(".")[2])
    if said is None:
        return launch
    numbers = {n: v for n, v in launch.args.items() if isinstance(v, (int, float))}
    names = {**sizes, "size": DTYPES[sizes["dtype"]].itemsize, **numbers}
    return replace(launch, elements=elements(said, names))


def _once(said: str, other: Sizes, target: str) -> list[Launch]:
    """What an op launches at its sizes, or at other ones; or the one kernel of it that is named."""
    name, sizes = parse(said)
    _, dot, kernel = said.partition(":")[0].partition(".")
    try:
        with capture(target) as found, torch.device("meta"):  # the vendor's products cost nothing
            OPS[name].launch(sizes | other)
    except (KeyError, RuntimeError) as error:
        raise ValueError(
            f"lab: {said} cannot be launched; {type(error).__name__}: {error}"
        ) from error
    once = {launch.name: _counted(launch, OPS[name], sizes | other) for launch in found}
    if dot:
        wanted = {n: launch for n, launch in once.items() if n.endswith(f".{kernel}")}
        if not wanted:
            names = ", ".join(n.partition(".")[2] for n in once)
            raise ValueError(f"lab: the kernels of {name} are {names}; got {kernel!r}")
        return list(wanted.values())
    return list(once.values())
