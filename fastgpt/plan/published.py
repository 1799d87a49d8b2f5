"""Published training runs, and what fastgpt.plan says of them.

    fastgpt plan published --into docs/plan.md

A published run gives a step's seconds, or something that they follow from: tokens a second, days or
device hours for so many tokens, FLOP/s by a formula that it states. Layouts are the published ones;
where none was published, one of ours, near the fastest that `fastgpt plan --pipeline` finds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from fastgpt.config import GPTConfig
from fastgpt.plan.clusters import cluster
from fastgpt.plan.layout import parse
from fastgpt.plan.roofline import Estimate, estimate

READ, RECALLED = "read", "recalled"
# How many times its bound a published run took: the least, the median, the most. A test holds them
# to what `table` says.
SLOWER = (1.04, 1.5, 2.22)


@dataclass(frozen=True)
class Source:
    """Where figures are from.

    Attributes:
        key: how the table calls it; title: with its address.
        how: "read": the figures were looked up when this was written; "recalled": written down
            from memory of the paper, not checked against it.
    """

    key: str
    title: str
    how: str


@dataclass(frozen=True)
class Run:
    """A published run.

    Attributes:
        seconds: of a step, as published or as it follows from what was.
        layout: words for `parse`; ours: whether it is this module's choice.
    """

    name: str
    config: GPTConfig
    chips: str
    layout: str
    T: int
    sequences: int
    seconds: float
    source: str
    ours: bool = False

    def estimate(self) -> Estimate:
        """What the plan says of it."""
        return estimate(
            self.config, parse(self.layout), self.T, self.sequences, cluster(self.chips)
        )


SOURCES = (
    Source("Patterson 2021", "Patterson et al., Carbon emissions and large neural network training,"
           " https://arxiv.org/abs/2104.10350, table 4: 10,000 V100, 14.8 days, 24.6 TFLOP/s each;"
           " 300 B tokens: Brown et al., 2020, https://arxiv.org/abs/2005.14165, table 2.1",
           RECALLED),
    Source("Narayanan 2021", "Narayanan et al., Efficient large-scale language model training on"
           " GPU clusters using Megatron-LM, https://arxiv.org/abs/2104.04473, table 1 and"
           " equation 3; the micro-batch is 1 and the interleaving the most that is possible, both"
           " assumed", RECALLED),
    Source("Korthikanti 2022", "Korthikanti et al., Reducing activation recomputation in large"
           " transformer models, https://arxiv.org/abs/2205.05198, tables 3 and 5", RECALLED),
    Source("Smith 2022", "Smith et al., Using DeepSpeed and Megatron to train Megatron-Turing NLG"
           " 530B, https://arxiv.org/abs/2201.11990, section 2.3", RECALLED),
    Source("Chowdhery 2022", "Chowdhery et al., PaLM, https://arxiv.org/abs/2204.02311, section 4"
           " and table 3: 238.3 K tokens/s, 46.2 % MFU. The shape is the nearest that GPTConfig"
           " has, of as many parameters: 72 heads of 256 where PaLM has 48, 12 of k and v where it"
           " has 1, a narrower feed-forward, blocks one after the other where PaLM's two branches"
           " run at once", READ),
    Source("Touvron 2023a", "Touvron et al., LLaMA, https://arxiv.org/abs/2302.13971, section 2.4:"
           " about 380 tokens/s/GPU on 2048 A100", RECALLED),
    Source("Touvron 2023b", "Touvron et al., Llama 2, https://arxiv.org/abs/2307.09288, table 2:"
           " 184,320 and 1,720,320 GPU hours for 2 T tokens, everything that went wrong included;"
           " the number of devices is assumed, for up to 2000 are reported", READ),
    Source("Grattafiori 2024", "Grattafiori et al., The Llama 3 herd of models,"
           " https://arxiv.org/abs/2407.21783, table 4: 430 and 400 TFLOP/s/GPU, taken to count"
           " causal attention's half; were it all, steps would be 4 % longer", READ),
    Source("Megatron-Core 2024", "README of https://github.com/NVIDIA/Megatron-LM, commit 0010ab7:"
           " GPT-3 175B, 1152 sequences, 47 % MFU on 96 H100 and 42 % on 4608; 2048 tokens a"
           " sequence and half of attention's FLOPs are assumed", READ),
)  # fmt: skip


def _megatron(
    billions: float, heads: int, width: int, layers: int, tp: int, pp: int, gpus: int, batch: int,
    tflops: float,
) -> Run:  # fmt: skip
    """A row of Narayanan et al.'s table 1; FLOPs by their equation 3, which counts recompute."""
    T, V = 2048, 51200
    flops = 96 * batch * T * layers * width**2
    flops *= 1 + T / (6 * width) + V / (16 * layers * width)  # type: ignore[assignment]
    dp, v = gpus // (tp * pp), layers // pp if pp > 1 else 1
    layout = f"dp={dp},tp={tp},pp={pp},interleave={v},recompute=block,sequence=false"
    return Run(
        f"GPT {billions:g}B", GPTConfig(T, V, layers, heads, width), "a100", layout, T, batch,
        flops / (gpus * tflops * 1e12), "Narayanan 2021",
    )  # fmt: skip


def _selective(
    name: str, heads: int, width: int, layers: int, layout: str, batch: int, seconds: float
) -> Run:
    """A row of Korthikanti et al.'s table 5: sequence parallel, selective recomputation, for
    which fused attention and recompute=1 stand."""
    config = GPTConfig(2048, 51200, layers, heads, width)
    layout = f"tp=8,{layout}"
    return Run(name, config, "a100", layout, 2048, batch, seconds, "Korthikanti 2022")


def _by_mfu(config: GPTConfig, T: int, batch: int, gpus: int, tflops: float) -> float:
    """Seconds of a step, from model FLOP/s of a device."""
    return config.flops(T, training=True) * batch / (gpus * tflops * 1e12)


def runs() -> tuple[Run, ...]:
    """All of them."""
    preset = GPTConfig.preset
    gpt3, llama3 = preset("gpt3-175b"), preset("llama3-405b")
    llama65 = GPTConfig(2048, 32000, 80, 64, 8192, variant="llama", n_inner=22016, tied=False)
    palm = GPTConfig(2048, 256000, 118, 72, 18432, variant="llama", n_kv_head=12, n_inner=67776)
    h100 = cluster("h100").peak_tflops
    return (
        Run("GPT-3 175B", gpt3, "v100", "fsdp=25,tp=8,pp=50,recompute=0,reshard=false", 2048, 1500,
            1500 * 2048 * 14.8 * 86400 / 300e9, "Patterson 2021", ours=True),
        _megatron(1.7, 24, 2304, 24, 1, 1, 32, 512, 137),
        _megatron(3.6, 32, 3072, 30, 2, 1, 64, 512, 138),
        _megatron(7.5, 32, 4096, 36, 4, 1, 128, 512, 142),
        _megatron(18.4, 48, 6144, 40, 8, 1, 256, 1024, 135),
        _megatron(39.1, 64, 8192, 48, 8, 2, 512, 1536, 138),
        _megatron(76.1, 80, 10240, 60, 8, 4, 1024, 1792, 140),
        _megatron(145.6, 96, 12288, 80, 8, 8, 1536, 2304, 148),
        _megatron(310.1, 128, 16384, 96, 8, 16, 1920, 2160, 155),
        _megatron(529.6, 128, 20480, 105, 8, 35, 2520, 2520, 163),
        _megatron(1008, 160, 25600, 128, 8, 64, 3072, 3072, 163),
        Run("MT-NLG 530B", GPTConfig(2048, 51200, 105, 128, 20480), "a100",
            "dp=8,tp=8,pp=35,recompute=block,sequence=false", 2048, 1920, 60.1, "Smith 2022"),
        _selective("GPT 22B", 64, 6144, 48, "micro_batch=4", 4, 1.10),
        _selective("GPT 175B", 96, 12288, 96, "pp=8,interleave=3", 64, 13.75),
        _selective("GPT 530B", 128, 20480, 105, "pp=35,interleave=3", 280, 37.83),
        _selective("GPT 1T", 160, 25600, 128, "pp=64", 512, 71.49),
        Run("PaLM 540B", palm, "tpu-v4",
            "dp=2,fsdp=256,tp=12,recompute=block,sequence=false", 2048, 2048,
            2048 * 2048 / 238.3e3, "Chowdhery 2022"),
        Run("LLaMA 65B", llama65, "a100", "fsdp=512,tp=4,micro_batch=4,recompute=0", 2048, 2048,
            2**22 / (380 * 2048), "Touvron 2023a", ours=True),
        Run("Llama 2 7B", preset("llama2-7b"), "a100", "fsdp=512,micro_batch=2,recompute=0", 4096,
            1024, 2**22 * 184320 * 3600 / 2e12 / 512, "Touvron 2023b", ours=True),
        Run("Llama 2 70B", preset("llama2-70b"), "a100", "fsdp=256,tp=8,micro_batch=4", 4096,
            1024, 2**22 * 1720320 * 3600 / 2e12 / 2048, "Touvron 2023b", ours=True),
        Run("Llama 3 405B", llama3, "h100", "fsdp=64,tp=8,pp=16,interleave=8", 8192,
            2048, _by_mfu(llama3, 8192, 2048, 8192, 430), "Grattafiori 2024"),
        Run("Llama 3 405B", llama3, "h100", "fsdp=128,tp=8,pp=16,interleave=8", 8192,
            2048, _by_mfu(llama3, 8192, 2048, 16384, 400), "Grattafiori 2024"),
        Run("GPT-3 175B", gpt3, "h100", "fsdp=2,tp=4,pp=12,interleave=4,reshard=false", 2048, 1152,
            _by_mfu(gpt3, 2048, 1152, 96, 0.47 * h100), "Megatron-Core 2024", ours=True),
        Run("GPT-3 175B", gpt3, "h100",
            "fsdp=48,tp=8,pp=12,interleave=8,micro_batch=2,recompute=0,reshard=false", 2048, 1152,
            _by_mfu(gpt3, 2048, 1152, 4608, 0.42 * h100), "Megatron-Core 2024", ours=True),
    )  # fmt: skip


def table() -> str:
    """Markdown: each run beside its bound, then how far off the bounds are, then the sources."""
    heads = ("run", "devices", "layout", "published step", "published MFU", "step at least",
             "MFU at most", "published / bound", "GiB", "source")  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    ratios = []
    for run in runs():
        made = run.estimate()
        ratio = run.seconds / made.step
        ratios.append(ratio)
        gib = f"{made.bytes / 2**30:.0f}{'' if made.fits else '!'}"
        cells = (
            run.name, f"{made.layout.world} {run.chips}", f"`{made.layout}`{'*' * run.ours}",
            f"{run.seconds:.2f} s", f"{made.mfu / ratio:.1%}", f"{made.step:.2f} s",
            f"{made.mfu:.1%}", f"{ratio:.2f}", gib, run.source,
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    low, middle, high = spread(ratios)
    errors = left_out(ratios)
    said = f"""
Published over bound: {middle:.2f} in the median, from {low:.2f} to {high:.2f}, of {len(ratios)} \
runs. A bound times the median of the others' ratios misses a published step by \
{median(errors):.0%} in the median, by {max(errors):.0%} at most. MFU counts FLOPs as \
`GPTConfig.flops` does, recomputation not, attention's causal half; * a layout of ours, where none \
was published; ! more memory than the device has left.
"""
    how = {READ: "", RECALLED: " (recalled, not looked up)"}
    sources = [f"- {s.key}: {s.title}{how[s.how]}." for s in SOURCES]
    return "\n".join([*lines, said, *sources])


def spread(ratios: Sequence[float]) -> tuple[float, float, float]:
    """The least, the median and the most."""
    return min(ratios), median(ratios), max(ratios)


def left_out(ratios: Sequence[float]) -> list[float]:
    """How far each is from the median of the others, relative to itself."""
    return [
        abs(median([*ratios[:n], *ratios[n + 1 :]]) / ratio - 1) for n, ratio in enumerate(ratios)
    ]
