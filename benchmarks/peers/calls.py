# mypy: disable-error-code="misc"
"""How each peer is called: one `Call` a kernel and size, by its own wrapper where it has one.

A wrapper of a peer runs on tensors without memory, and what it would launch is written down. Where
a file cannot be imported without a GPU or its package's dependencies, `kernels_of` takes the file's
kernels alone, and their arguments stand here.
"""

import ast
import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor

Elements = dict[str, str | float]
WIDTHS = (768, 1024, 1600, 4096)
FEWER = (768, 4096)  # of peers that are behind another at every width
HEAD_DIMS = (64, 128)
VOCABULARIES = (50257, 50304)
TILES = ((64, 4), (64, 8), (32, 4), (128, 8))  # of the tutorial's attention: BLOCK_N and warps
M = 8192  # rows: GPT-2's 8 x 1024 tokens


@dataclass(frozen=True)
class Call:
    """One peer's way to do one thing.

    Attributes:
        what: "layer norm, forward"; at: "768"; peer: whose.
        run: launches it.
        kernels: of what is launched, the kernels that are compared, by name, and what each works
            through (`fastgpt.lab.launch.Elements`), as expressions of its arguments, M and N.
        tuned: which configurations of its autotuner are worth compiling: those that came out best
            on some chip when all were compiled (`--every-configuration`).
    """

    what: str
    at: str
    peer: str
    run: Callable[[], Any]
    kernels: dict[str, Elements]
    names: dict[str, float] = field(default_factory=dict)
    tuned: Callable[[Any], bool] = lambda config: True


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16, **how: Any) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", **how)


def kernels_of(path: Path) -> ModuleType:
    """The kernels of a file, and the module-level constants they use, without all the rest.

    What is dropped leaves its lines empty, so that line numbers are those of the file.
    """
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    keep: set[int] = set()
    for node in ast.parse(text).body:
        imports = isinstance(node, ast.Import) and all(
            a.name.startswith(("triton", "torch")) for a in node.names
        )
        constant = isinstance(node, ast.Assign) and (
            isinstance(node.value, ast.Constant) or ast.unparse(node.value).startswith("tl.")
        )
        jit = isinstance(node, ast.FunctionDef) and [
            d.lineno for d in node.decorator_list if ast.unparse(d).startswith("triton.jit")
        ]
        if jit or imports or constant:  # other decorators are the package's own
            keep |= {*(jit or ()), *range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    made = "\n".join(line if n in keep else "" for n, line in enumerate(lines, 1))
    folder = Path(tempfile.gettempdir()) / "fastgpt-peers"
    folder.mkdir(exist_ok=True)
    file = folder / f"{path.parent.parent.name}_{path.stem}.py"
    if not file.is_file() or file.read_text() != made:
        file.write_text(made)
    return module_at(file)


def module_at(path: Path) -> ModuleType:
    name = f"peer_{path.stem.replace('-', '_')}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def without_calls(path: Path) -> ModuleType:
    """A script as a module: its definitions, without what it runs at its end."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in ast.parse(text).body:
        called = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        if called or (isinstance(node, ast.If) and "libtriton" in ast.unparse(node)):
            for n in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                lines[n - 1] = ""
    folder = Path(tempfile.gettempdir()) / "fastgpt-peers"
    folder.mkdir(exist_ok=True)
    file = folder / path.name
    made = "\n".join(lines)
    if not file.is_file() or file.read_text() != made:
        file.write_text(made)
    return module_at(file)


ROW: Elements = {"launch": "M * N", "bytes": 4}
BACK: Elements = {"launch": "M * N", "loop": "N", "bytes": 6}


def liger() -> Iterator[Call]:
    ln = importlib.import_module("liger_kernel.ops.layer_norm")
    rms = importlib.import_module("liger_kernel.ops.rms_norm")
    embedding = importlib.import_module("liger_kernel.ops.experimental.embedding")
    ce = importlib.import_module("liger_kernel.ops.cross_entropy")
    for N in FEWER:
        x, w, rows = empty(M, N), empty(N, dtype=torch.float32), empty(M, dtype=torch.float32)
        names = {"M": M, "N": N}
        yield Call(
            "layer norm, forward", str(N), "liger",
            lambda x=x, w=w: ln.layer_norm_forward(x, w, w, 1e-5),
            {"_layer_norm_forward_kernel": ROW}, names,
        )  # fmt: skip
        yield Call(
            "layer norm, backward", str(N), "liger",
            lambda x=x, w=w, rows=rows: ln.layer_norm_backward(x, x, w, w, rows, rows),
            {"_layer_norm_backward_kernel": BACK}, names,
        )  # fmt: skip
        block, warps = ln.calculate_settings(N)
        yield Call(
            "rms norm, forward", str(N), "liger",
            lambda x=x, w=w: rms.rms_norm_forward(x, w, 1e-5, 0.0, "llama", None),
            {"_rms_norm_forward_kernel": ROW, "_block_rms_norm_forward_kernel": ROW}, names,
        )  # fmt: skip
        yield Call(
            "rms norm, backward", str(N), "liger",
            lambda x=x, w=w, rows=rows, block=block, warps=warps: rms.rms_norm_backward(
                x, x, w, rows, 0.0, rms._CASTING_MODE_LLAMA.value, block, warps, False, None
            ),
            {"_rms_norm_backward_kernel": BACK,
             "_block_rms_norm_backward_kernel": BACK | {"loop": "BLOCK_ROW * N"}}, names,
        )  # fmt: skip
        table = empty(50304, N)
        ids = empty(M, dtype=torch.int64)
        yield Call(
            "embedding, forward", str(N), "liger",
            lambda table=table, ids=ids: embedding.LigerEmbeddingFunction.apply(table, ids),
            {"embedding_forward_kernel": {"launch": "M * N", "bytes": 4}}, names,
        )  # fmt: skip
    for V in VOCABULARIES:
        yield Call(
            "cross-entropy, loss and gradient", str(V), "liger",
            lambda V=V: ce.cross_entropy_forward(
                torch.zeros(16, V, dtype=torch.bfloat16, requires_grad=True),
                torch.zeros(16, dtype=torch.int64), None, -100, 0.0, 0.0, "mean", None, False,
            ),
            {"liger_cross_entropy_kernel": {
                "launch": "M * N", "loop": "N / cdiv(N, BLOCK_SIZE)", "bytes": 4}},
            {"M": 16, "N": V},
        )  # fmt: skip


def fla() -> Iterator[Call]:
    ln = importlib.import_module("fla.modules.norm.layernorm")
    attn = importlib.import_module("fla.ops.attn.parallel")
    ce = importlib.import_module("fla.modules.fused_cross_entropy.ops")
    shared = attn.check_shared_mem  # a tensor without memory has no device number
    vars(attn)["check_shared_mem"] = lambda arch, index=None: shared(arch, index or 0)
    for N in WIDTHS:
        x, w, rows = empty(M, N), empty(N, dtype=torch.float32), empty(M, dtype=torch.float32)
        names = {"M": M, "N": N}
        for what, bias, is_rms in (("layer norm", w, False), ("rms norm", None, True)):
            yield Call(
                f"{what}, forward", str(N), "fla",
                lambda x=x, w=w, b=bias, r=is_rms: ln.layer_norm_fwd(x, w, b, is_rms_norm=r),
                {"layer_norm_fwd_kernel_row": ROW}, names,
                tuned=lambda c: c.num_warps <= 4,
            )  # fmt: skip
            yield Call(
                f"{what}, backward", str(N), "fla",
                lambda x=x, w=w, b=bias, rows=rows, r=is_rms: ln.layer_norm_bwd(
                    x, x, w, b, None if r else rows, rows, is_rms_norm=r
                ),
                {"layer_norm_bwd_kernel_row": BACK}, names,
                tuned=lambda c: c.num_warps <= 4,
            )  # fmt: skip
    scores: Elements = {"loop": "BT * BS"}
    for D in HEAD_DIMS:
        q = empty(8, 1024, 12, D)
        lse = empty(8, 1024, 12, dtype=torch.float32)
        yield Call(
            "attention, forward", str(D), "fla",
            lambda q=q, D=D: attn.parallel_attn_fwd(q, q, q, None, None, D**-0.5),
            {"parallel_attn_fwd_kernel": scores},
        )  # fmt: skip
        for part, kernel in (("dk and dv", "dkv"), ("dq", "dq")):
            yield Call(
                f"attention, backward, {part}", str(D), "fla",
                lambda q=q, lse=lse, D=D: attn.parallel_attn_bwd(
                    q, q, q, q, None, lse, q, None, D**-0.5
                ),
                {f"parallel_attn_bwd_kernel_{kernel}": scores},
            )  # fmt: skip
    for V in VOCABULARIES:
        x, target = empty(M, V), empty(M, dtype=torch.int64)
        lse = empty(M, dtype=torch.float32)

        def both(x: Tensor = x, target: Tensor = target, lse: Tensor = lse) -> None:
            ce.cross_entropy_fwd(x, target)
            ce.cross_entropy_bwd(x, target, lse, lse)

        yield Call(
            "cross-entropy, loss and gradient", str(V), "fla", both,
            {"cross_entropy_fwd_kernel": {"launch": "M * N", "bytes": 2},
             "cross_entropy_bwd_kernel": {"launch": "M * N", "bytes": 4}},
            {"M": M, "N": V},
        )  # fmt: skip


def torchnorm() -> Iterator[Call]:
    norm = importlib.import_module("torchnorm._triton")

    class Context:
        saved_tensors: tuple[Tensor, ...]

        def save_for_backward(self, *tensors: Tensor) -> None:
            self.saved_tensors = tensors

    def forward_and_backward(function: Any, *inputs: Any) -> None:
        context = Context()
        y = function.forward(context, *inputs)
        function.backward(context, y)

    for N in FEWER:
        x, w = empty(M, N), empty(N, dtype=torch.float32)
        names = {"M": M, "N": N}
        for what, function, inputs, kernel in (
            ("layer norm", norm._LayerNormFunc, (x, w, w, 1e-5), "_layer_norm"),
            ("rms norm", norm._RMSNormFunc, (x, w, 1e-5), "_rms_norm"),
        ):
            for way, short, bytes in (("forward", "fwd", 4), ("backward", "bwd", 6)):
                yield Call(
                    f"{what}, {way}", str(N), "torchnorm",
                    lambda f=function, i=inputs: forward_and_backward(f, *i),
                    {f"{kernel}_{short}_kernel": {"launch": "M * N", "bytes": bytes}}, names,
                )  # fmt: skip


def fasterkernels() -> Iterator[Call]:
    fa2 = importlib.import_module("fskernels.triton.triton_fa2")
    for D in HEAD_DIMS:
        q = empty(8, 12, 1024, D)
        yield Call(
            "attention, forward", str(D), "fasterkernels",
            lambda q=q: fa2.flash_attention_2_fwd(q, q, q),
            {"_flash_attn_fwd_kernel": {"loop": "BLOCK_M * BLOCK_N"}},
        )  # fmt: skip


def cut_cross_entropy() -> Iterator[Call]:
    forward = importlib.import_module("cut_cross_entropy.cce_lse_forward")
    backward = importlib.import_module("cut_cross_entropy.cce_backward")
    for V in VOCABULARIES:
        e, c = empty(M, 768), empty(V, 768, requires_grad=True)
        rows = empty(M, dtype=torch.float32)
        target = empty(M, dtype=torch.int64)
        yield Call(
            "linear cross-entropy, forward", str(V), "cut-cross-entropy",
            lambda e=e, c=c: forward.cce_lse_forward_kernel(e, c), {"_cce_lse_forward_kernel": {}},
        )  # fmt: skip
        yield Call(
            "linear cross-entropy, backward", str(V), "cut-cross-entropy",
            lambda e=e, c=c, rows=rows, target=target: backward.cce_backward_kernel(
                rows, e, c, rows, None, None, None, target
            ),
            {"_cce_backward_kernel": {}},
        )  # fmt: skip


def unsloth(site: Path) -> Iterator[Call]:
    folder = site / "unsloth" / "kernels"
    ln = kernels_of(folder / "layernorm.py")
    for N in FEWER:
        x, w, rows = empty(M, N), empty(N, dtype=torch.float32), empty(M, dtype=torch.float32)
        names = {"M": M, "N": N}
        block = triton.next_power_of_2(N)
        warps = 16 if block >= 8192 else 8 if block >= 2048 else 4
        sizes = {"n_cols": N, "LONG_INDEXING": False, "BLOCK_SIZE": block, "num_warps": warps}
        yield Call(
            "layer norm, forward", str(N), "unsloth",
            lambda x=x, w=w, rows=rows, N=N, s=sizes: ln.layernorm_forward[(M,)](
                x, x, w, w, rows, rows, Y_row_stride=N, X_row_stride=N, eps=1e-5,
                enable_fp_fusion=True, **s,
            ),
            {"layernorm_forward": ROW}, names,
        )  # fmt: skip
        part = empty(1024, N, dtype=torch.float32)
        yield Call(
            "layer norm, backward", str(N), "unsloth",
            lambda x=x, w=w, rows=rows, part=part, N=N, s=sizes: ln.layernorm_backward_dw[(1024,)](
                x, x, x, w, rows, rows, part, part, M, 8, dY_row_stride=N, dX_row_stride=N,
                X_row_stride=N, TRAIN_W=True, TRAIN_B=True, enable_fp_fusion=True, **s,
            ),
            {"layernorm_backward_dw": BACK}, names,
        )  # fmt: skip


def tutorials(folder: Path) -> Iterator[Call]:
    attention = without_calls(folder / "06-fused-attention.py")
    ln = without_calls(folder / "05-layer-norm.py")
    gemm = without_calls(folder / "09-persistent-matmul.py")

    class Context:
        needs_input_grad = (True, True, True)
        saved_tensors: tuple[Tensor, ...]

        def save_for_backward(self, *tensors: Tensor) -> None:
            self.saved_tensors = tensors

    for D in HEAD_DIMS:
        q = empty(8, 12, 1024, D, dtype=torch.float16)

        def forward(q: Tensor = q, D: int = D) -> Context:
            context: Any = Context()
            attention._attention.forward(context, q, q, q, True, D**-0.5, False)
            return context

        def backward(q: Tensor = q, D: int = D) -> None:
            context: Any = Context()
            context.sm_scale, context.HEAD_DIM, context.causal = D**-0.5, D, True
            lse = empty(8, 12, 1024, dtype=torch.float32)
            context.save_for_backward(q, q, q, q, lse)
            attention._attention.backward(context, q)

        yield Call(
            "attention, forward", str(D), "tutorial", forward,
            {"_attn_fwd": {"loop": "BLOCK_M * BLOCK_N"}},
            tuned=lambda c, D=D: (
                c.kwargs["BLOCK_M"] == 128
                and c.num_stages in (1, 3)
                and (c.kwargs["BLOCK_N"], c.num_warps) in TILES
            ),
        )  # fmt: skip
        yield Call(
            "attention, backward, dk and dv", str(D), "tutorial", backward,
            {"_attn_bwd": {"loop": "BLOCK_M1 * BLOCK_N1"}},
        )  # fmt: skip
    for N in FEWER:
        x, w = empty(M, N), empty(N, dtype=torch.float32)
        names = {"M": M, "N": N}

        def both(x: Tensor = x, w: Tensor = w, N: int = N) -> None:
            context = Context()
            ln.LayerNorm.forward(context, x, (N,), w, w, 1e-5)
            ln.LayerNorm.backward(context, x)

        yield Call(
            "layer norm, forward", str(N), "tutorial", both,
            {"_layer_norm_fwd_fused": {
                "launch": "M * N", "loop": "N / cdiv(N, BLOCK_SIZE)", "bytes": 4}}, names,
        )  # fmt: skip
        yield Call(
            "layer norm, backward", str(N), "tutorial", both,
            {"_layer_norm_bwd_dx_fused": {"launch": "M * N", "loop": "N", "bytes": 6}}, names,
        )  # fmt: skip
    a = empty(4096, 4096, dtype=torch.float16)

    def likely(config: Any) -> bool:
        n, k = config.kwargs["BLOCK_SIZE_N"], config.kwargs["BLOCK_SIZE_K"]
        best = ((256, 64, 8, 3), (256, 128, 8, 2), (128, 64, 4, 3), (128, 64, 8, 3))
        return (n, k, config.num_warps, config.num_stages) in best

    yield Call(
        "matrix product", "4096", "tutorial", lambda: gemm.matmul(a, a), {"matmul_kernel": {}},
        tuned=likely,
    )  # fmt: skip
    if gemm.supports_tma():
        yield Call(
            "matrix product", "4096", "tutorial, TMA", lambda: gemm.matmul_tma(a, a, False),
            {"matmul_kernel_tma": {}}, tuned=likely,
        )  # fmt: skip
