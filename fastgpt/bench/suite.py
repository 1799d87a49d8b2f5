"""What `fastgpt bench --suite cpu` measures, in under ten minutes on two cores."""

from dataclasses import replace

from fastgpt.bench import models
from fastgpt.bench.ops import OPS
from fastgpt.bench.players import CTRANSLATE2, HUGGING_FACE, LLAMA_CPP, NANOGPT, OURS
from fastgpt.bench.run import Planned
from fastgpt.bench.start import START

STEP, DECODE, SCALING = "training step", "decode", "scaling"
OP, AT_START = "ops", "start"
PEERS = (OURS, HUGGING_FACE, NANOGPT)
WRITERS = (OURS, HUGGING_FACE, CTRANSLATE2, LLAMA_CPP)  # nanoGPT has no cache
# What torch.compile makes takes minutes to make.
EAGER = (
    "fastgpt", "torch", "sdpa", "flash", "F.linear_cross_entropy", "torch fused", "torch foreach",
)  # fmt: skip
# GPT-2 small's, where an op has several sizes.
OF_GPT2 = {"attention": 1, "ffn": 1, "adamw": 1}
SMALLER = {"linear_cross_entropy": {"M": 256}}
CONTEXTS = (64, 256, 1024, 4096, 16384)
WIDTHS = (128, 256, 512, 1024)
DEPTHS = (1, 2, 4, 8, 16)


def cpu(small: bool = False) -> list[Planned]:
    """Start, training step, decode, ops, scaling.

    Args:
        small: sizes that take no time, for tests.
    """
    found = [Planned(START, "none", {}, (START,), 7, part=AT_START)]
    shape = {"L": 1, "H": 2, "C": 32, "V": 64} if small else {}
    step = models.sizes("step", "cpu") | ({"B": 1, "T": 8} | shape if small else {})
    found += [
        Planned("step", "float32", step, ("step",), 2, PEERS, STEP),
        Planned("step", "autocast", step, ("step",), 5, PEERS, STEP),
    ]
    write = models.sizes("decode", "cpu") | {"N": 32} | ({"T": 4, "N": 4} | shape if small else {})
    for B in (1, 8):
        for precision in ("float32", "bfloat16", "int8"):
            sizes = write | {"B": B}
            found.append(Planned("decode", precision, sizes, ("decode",), 4, WRITERS, DECODE))
    for op, module in OPS.items():
        sizes = module.sizes("cpu")[OF_GPT2.get(op, 0)] | SMALLER.get(op, {})
        if small:
            sizes = {n: min(v, 8) for n, v in sizes.items()}
        alone = op in ("adamw", "attention_decode", "quantized_linear")
        modes = ("forward",) if alone else ("both",)
        found.append(Planned(op, "float32", sizes, modes, 8, EAGER, OP))
    found += scaling(small)
    return [replace(p, rounds=1, alone=False) for p in found] if small else found


def scaling(small: bool = False) -> list[Planned]:
    """Attention along T; a GPT's step along T, width and depth, which is the number of weights."""
    found = []
    for T in (8, 16, 32) if small else CONTEXTS:
        sizes = {"B": 1, "T": T, "H": 2, "D": 64}
        who = ("fastgpt", "sdpa") if T > 4096 else ("fastgpt", "sdpa", "math")
        found.append(Planned("attention", "float32", sizes, ("both",), 3, who, f"{SCALING} T"))
    gpt = {"B": 1, "T": 128, "L": 2, "H": 4, "C": 256, "V": 2048}
    if small:
        gpt |= {"T": 8, "C": 32, "V": 64}
    sweeps = {
        "T": (8, 16, 32) if small else CONTEXTS,
        "C": (32, 64, 96) if small else WIDTHS,
        "L": (1, 2, 3) if small else DEPTHS,
    }
    for name, values in sweeps.items():
        for value in values:
            sizes = gpt | {name: value}
            if name == "T" and not small:
                sizes |= {"L": 1, "C": 128, "H": 2}
            found.append(
                Planned("step", "float32", sizes, ("step",), 3, (OURS,), f"{SCALING} {name}", False)
            )
    return found
