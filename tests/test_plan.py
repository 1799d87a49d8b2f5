"""What fastgpt.plan measures is what the model does; what it works out of that is right."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastgpt.config import GPTConfig
from fastgpt.lab import memory
from fastgpt.model import GPT
from fastgpt.ops.backend import INTERPRET
from fastgpt.plan import Cluster, Layout, cluster, estimate, search
from fastgpt.plan.clusters import CLUSTERS, read, sent
from fastgpt.plan.layout import RECOMPUTE, candidates, divisors, parse
from fastgpt.plan.measure import _at, _run, measure, parameters
from fastgpt.plan.roofline import stages
from tests.conftest import HAS_CUDA

pytestmark = pytest.mark.skipif(HAS_CUDA or INTERPRET, reason="fake tensors, without a GPU")

T = 128
GPT2 = GPTConfig(T, 512, 4, 8, 256)
LLAMA = GPTConfig(T, 512, 4, 8, 256, variant="llama", n_kv_head=4, qk_norm=True, tied=False)
A100 = cluster("a100")
ROOMY = replace(A100, name="roomy", memory_gib=1e6)
SHAPES = pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])


def totals(config: GPTConfig, layout: Layout) -> tuple[float, float]:
    """FLOPs of a micro-batch, forward and backward, on one rank."""
    m = measure(config, layout, T, A100)
    f, b = (config.n_layer * x["layer"].flops + x["ends"].flops for x in (m.forward, m.backward))
    return f, b


@pytest.mark.parametrize("name", ["gpt2", "llama3-8b", "gpt3-175b"])
def test_parameters_are_the_models(name: str) -> None:
    config = GPTConfig.preset(name)
    with torch.device("meta"):
        assert parameters(config) == GPT(replace(config, n_layer=2)).num_params() + (
            config.n_layer - 2
        ) * sum(p.numel() for p in GPT(replace(config, n_layer=1)).h[0].parameters())


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llama2-7b", 6.738), ("llama2-13b", 13.016), ("llama2-70b", 68.977), ("llama3-8b", 8.030),
     ("llama3-70b", 70.554), ("llama3-405b", 405.853), ("gpt3-175b", 174.604)],
)  # fmt: skip
def test_presets_have_the_parameters_of_the_published_weights(name: str, billions: float) -> None:
    """Those of Llama are what the published checkpoints have."""
    assert round(parameters(GPTConfig.preset(name)) / 1e9, 3) == billions


@SHAPES
def test_flops_are_those_of_the_formula(config: GPTConfig) -> None:
    """The loss makes its gradients in forward; attention's backward multiplies once more."""
    forward, backward = totals(config, Layout(recompute="0"))
    head = 2 * T * config.vocab_size * config.n_embd
    again = config.n_layer * config.n_embd * T * (T + 1)
    assert forward == config.flops(T) + 2 * head
    assert backward == config.flops(T, training=True) - forward + again


@SHAPES
@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(cp=2), Layout(tp=4, cp=2)], ids=str)
def test_ranks_share_the_products(config: GPTConfig, layout: Layout) -> None:
    whole, part = totals(config, Layout()), totals(config, layout)
    n = layout.tp * layout.cp
    assert (part[0] * n, part[1] * n) == whole


@SHAPES
def test_ranks_share_the_weights(config: GPTConfig) -> None:
    """All matrices; norms and the biases that end a branch each has whole."""
    whole = measure(config, Layout(), T, A100).weights
    part = measure(config, Layout(tp=4), T, A100).weights
    with torch.device("meta"):
        block = GPT(config).h[0]
    ends = ("c_proj.bias", "ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias", "norm.weight")
    own = sum(p.numel() for name, p in block.named_parameters() if name.endswith(ends))
    assert whole["layer"] == sum(p.numel() for p in block.parameters())
    assert 4 * (part["layer"] - own) == whole["layer"] - own


@SHAPES
@pytest.mark.parametrize("recompute", ["0", "1", "2"])
def test_what_is_kept_is_what_autograd_keeps(config: GPTConfig, recompute: str) -> None:
    """By the hooks of saved tensors, another way to see it, on the model itself."""
    B = 3
    level = replace(config, recompute=int(recompute))

    def build() -> tuple[nn.Module, memory.Call]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = GPT(level)
        finally:
            torch.set_default_dtype(before)
        ids = torch.zeros(B, T, dtype=torch.int64)
        return model, lambda: model(ids, ids)

    with memory._path("fastgpt"):
        hooked = memory.of_model(build)
    m = measure(config, Layout(recompute=recompute, micro_batch=B), T, A100)
    kept = config.n_layer * m.kept["layer"] + m.kept["ends"]
    assert kept == hooked - 8 * B * T + 4  # hooks see the ids too, and not the loss itself


@SHAPES
@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(tp=2, recompute="2"), Layout(cp=2, recompute="block")],
    ids=str,
)
def test_more_layers_and_more_rows_are_what_is_worked_out(
    config: GPTConfig, layout: Layout
) -> None:
    """From 2 and 3 layers and 1 and 2 rows to 6 layers and 5 rows."""
    layout = replace(layout, micro_batch=5)
    m = measure(config, layout, T, A100)
    level = 0 if layout.recompute == "block" else int(layout.recompute)
    deep = _run(config, replace(layout, micro_batch=1), T, 5, 6, level)
    assert 6 * m.kept["layer"] + m.kept["ends"] == deep.kept
    assert (
        6 * m.forward["layer"].flops + m.forward["ends"].flops == deep.flops[deep.which == 0].sum()
    )
    assert 6 * m.backward["layer"].flops + m.backward["ends"].flops == (
        deep.flops[deep.which == 1].sum()
    )
    peak = 6 * m.kept["layer"] + m.kept["ends"] + m.workspace
    assert deep.live.max() <= peak
    if m.workspace < 512 * 5 * T * 2:  # else logits inside of an op, which no run sees
        assert peak == deep.live.max()
    rows = _at(config, replace(layout, micro_batch=1), T, 5, 3)
    seen = _run(config, replace(layout, micro_batch=1), T, 5, 3, level)
    for ours, theirs in (
        (rows.flops, seen.flops),
        (rows.bytes, seen.bytes),
        (rows.live, seen.live),
    ):
        assert (ours == theirs).all()


def test_each_level_of_recompute_keeps_less_and_costs_no_less() -> None:
    found = [measure(GPT2, Layout(recompute=level), T, A100) for level in RECOMPUTE]
    kept = [m.kept["layer"] for m in found]
    flops = [m.backward["layer"].flops for m in found]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 4
    assert flops == sorted(flops) and flops[0] == flops[1] < flops[2] < flops[3]
    assert kept[3] == 2 * T * GPT2.n_embd * 2  # the stream and the branch beside it
    forward = found[0].forward["layer"].flops
    assert flops[3] == flops[0] + forward


def test_tensor_parallel_traffic() -> None:
    """Two gathers and two scatters of all tokens a pass, and in backward what was gathered once
    more (Korthikanti et al., 2022); gradients of what all hold are summed."""
    whole = T * GPT2.n_embd * 2
    m = measure(GPT2, Layout(tp=2), T, A100)
    forward, backward = m.forward["layer"].traffic, m.backward["layer"].traffic
    assert dict(forward) == {
        ("all-gather", "tp"): (2 * whole, 2), ("reduce-scatter", "tp"): (2 * whole, 2)
    }  # fmt: skip
    assert backward["all-gather", "tp"] == (4 * whole, 4)
    assert backward["reduce-scatter", "tp"] == (2 * whole, 2)
    assert backward["all-reduce", "tp"] == (6 * GPT2.n_embd * 2, 6)  # two norms, two biases
    alone = measure(GPT2, Layout(tp=2, sequence=False), T, A100)
    assert dict(alone.forward["layer"].traffic) == {("all-reduce", "tp"): (2 * whole, 2)}
    assert alone.backward["layer"].traffic["all-reduce", "tp"] == (2 * whole, 2)
    assert alone.kept["layer"] > m.kept["layer"]


def test_context_parallel_traffic() -> None:
    """k and v gathered, twice, and their gradients scattered in float32."""
    whole = 2 * T * LLAMA.kv_heads * LLAMA.head_dim * 2
    m = measure(LLAMA, Layout(cp=2), T, A100)
    assert dict(m.forward["layer"].traffic) == {("all-gather", "cp"): (whole, 1)}
    assert dict(m.backward["layer"].traffic) == {
        ("all-gather", "cp"): (whole, 1), ("reduce-scatter", "cp"): (2 * whole, 1)
    }  # fmt: skip


def test_a_process_with_peers_does_not_plan() -> None:
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(ValueError, match=r"^plan: this process belongs to a process group"):
            measure(replace(GPT2, n_layer=3), Layout(tp=2), T, A100)
    finally:
        dist.destroy_process_group()


def test_volumes_and_links() -> None:
    assert sent("all-gather", 4, 100.0) == 75 and sent("all-reduce", 4, 100.0) == 150
    assert sent("send", 4, 100.0) == 100 and sent("all-reduce", 1, 100.0) == 0
    c = Cluster("c", 100, 100, 10, 8, 300, 25, intra_us=0, inter_us=1)
    assert c.link(8, 1) == ("intra", 300) and c.link(2, 4) == ("intra", 300)
    assert c.link(2, 8) == ("inter", 25)  # neighbours of two nodes
    assert c.link(16, 1) == ("inter", 200)  # a ring through 8 adapters
    assert c.link(64, 4) == ("inter", 50)
    assert c.seconds("all-gather", 2, 8, 50e9) == pytest.approx(1.0 + 1e-6)
    assert c.seconds("all-reduce", 16, 8, 0.0) == 0.0
    assert c.seconds("all-reduce", 1024, 8, 1e-3, 3) == pytest.approx(3 * 20e-6)


def test_memory_of_a_small_layout_by_hand() -> None:
    m = measure(GPT2, Layout(), T, A100)
    p, layer = parameters(GPT2), m.weights["layer"]
    row = estimate(GPT2, Layout(fsdp=8), T, 8, A100).memory
    assert row["weights"] == row["gradients"] == 4 * p / 8 and row["optimizer"] == 8 * p / 8
    assert row["gathered"] == 2 * (2 * layer + p - 4 * layer) + 4 * layer
    kept = estimate(GPT2, Layout(fsdp=8, reshard=False), T, 8, A100).memory
    assert kept["gathered"] == 2 * p
    summed = estimate(GPT2, Layout(fsdp=8, reshard=False), T, 16, A100).memory
    assert summed["gathered"] == 2 * p + 4 * p
    assert row["activations"] == 4 * m.kept["layer"] + m.kept["ends"]
    alone = estimate(GPT2, Layout(dp=8), T, 8, A100).memory
    assert alone["weights"] + alone["gradients"] + alone["optimizer"] + alone["gathered"] == 18 * p


def test_traffic_of_a_step_by_hand() -> None:
    """FSDP: two gathers and a scatter a layer and micro-batch; DDP: one all-reduce a step."""
    m = measure(GPT2, Layout(), T, A100)
    p, outer = parameters(GPT2), parameters(GPT2) - 4 * m.weights["layer"]
    flows = {f.kind: f for f in estimate(GPT2, Layout(fsdp=4), T, 8, A100).flows}
    assert flows["all-gather"].bytes == pytest.approx(0.75 * 2 * (2 * 2 * (p - outer) + outer))
    assert flows["reduce-scatter"].bytes == pytest.approx(0.75 * 4 * 2 * p)
    (flow,) = estimate(GPT2, Layout(dp=4), T, 8, A100).flows
    assert (flow.kind, flow.link) == ("all-reduce", "intra")
    assert flow.bytes == pytest.approx(1.5 * 4 * p)


def test_a_pipelines_bubble_and_stages() -> None:
    assert stages(105, 35) == (3, 3) and stages(126, 16) == (8, 6) and stages(96, 10) == (10, 6)
    plain = estimate(GPT2, Layout(pp=4), T, 8, A100)
    twice = sum(plain.parts[k] for k in ("products", "memory", "pp"))
    assert plain.parts["bubble"] == pytest.approx(3 * twice / 8)
    config = replace(GPT2, n_layer=8)
    interleaved = estimate(config, Layout(pp=4, interleave=2), T, 8, A100).parts
    busy = sum(interleaved[k] for k in ("products", "memory", "pp"))
    assert interleaved["bubble"] == pytest.approx(3 / 2 * busy / 8)
    with pytest.raises(ValueError, match=r"^plan: an interleaved pipeline's micro-batches must"):
        estimate(config, Layout(pp=4, interleave=2), T, 6, A100)


LAYOUTS = [
    layout
    for world in (1, 4, 16)
    for layout in candidates(GPT2, world, T, 8, pipeline=True)
    if layout.interleave == 1
]


@settings(max_examples=80)
@given(
    layout=st.sampled_from(LAYOUTS),
    sequences=st.integers(1, 64),
    faster=st.sampled_from(["peak_tflops", "bandwidth_gbs", "intra_gbs", "inter_gbs"]),
    by=st.floats(1.0, 100.0),
)
def test_faster_hardware_is_no_slower_and_no_bound_is_passed(
    layout: Layout, sequences: int, faster: str, by: float
) -> None:
    row = estimate(GPT2, layout, T, sequences, A100)
    assert row.sequences >= sequences and row.sequences % (layout.data * layout.micro_batch) == 0
    assert 0 < row.mfu < 1
    assert min(row.parts.values()) >= 0 and min(row.memory.values()) >= 0
    # What an axis exposes, it also sends.
    for axis in ("tp", "cp", "fsdp", "dp", "pp"):
        spent = sum(flow.seconds for flow in row.flows if flow.axis == axis)
        assert row.parts[axis] <= spent * (1 + 1e-9)
    better = replace(A100, **{faster: getattr(A100, faster) * by})
    assert estimate(GPT2, layout, T, sequences, better).step <= row.step * (1 + 1e-9)


def test_the_best_is_the_fastest_that_fits() -> None:
    small = replace(A100, memory_gib=4.2)
    found = search(GPT2, small, 8, T, 64)
    assert all(row.fits and row.layout.world == 8 for row in found.rows)
    speeds = [row.tokens_per_second for row in found.rows]
    assert speeds == sorted(speeds, reverse=True)
    # A bound must hold for each: try every layout by itself.
    for layout in candidates(GPT2, 8, T, 8):
        for level in RECOMPUTE:
            for size in (1, 2, 4, 8):
                if 64 % (layout.data * size):
                    continue
                row = estimate(
                    GPT2, replace(layout, recompute=level, micro_batch=size), T, 64, small
                )
                assert not row.fits or row.tokens_per_second <= found.best.tokens_per_second


def test_memory_binds_where_more_of_it_would_be_faster() -> None:
    tight = replace(A100, memory_gib=4.012, intra_gbs=5.0)
    assert "memory" in search(GPT2, tight, 8, T, 512).binds
    assert search(GPT2, ROOMY, 8, T, 512).wish is None


def test_too_little_memory_names_the_smallest_number_of_devices() -> None:
    config, T = GPTConfig.preset("gpt3-13b"), 2048
    with pytest.raises(ValueError) as raised:
        search(config, A100, 2, T, 64, recompute=("block",))
    assert str(raised.value) == (
        "plan: 12.9 B parameters do not fit on 2 x a100 of 80 GiB in any layout;"
        " the smallest number on which one does is 4"
    )
    assert search(config, A100, 4, T, 64, recompute=("block",)).best.fits
    tiny = replace(A100, memory_gib=4.5)
    with pytest.raises(ValueError, match=r"nor on up to 32768 with 1 sequences a step$"):
        search(config, tiny, 8, T, 1, recompute=("block",))
    message = r"^plan: 64 devices cannot share 2 sequences a step .*; give a larger batch$"
    with pytest.raises(ValueError, match=message):
        search(config, A100, 64, T, 2)


def test_candidates_multiply_to_the_world_and_hold_the_model() -> None:
    for world in (1, 6, 24, 1000):
        found = list(candidates(LLAMA, world, T, 8, pipeline=True))
        assert found and len(set(found)) == len(found)
        assert all(layout.world == world for layout in found)
        assert all(LLAMA.kv_heads % layout.tp == 0 and layout.tp <= 8 for layout in found)
    assert divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]


def test_a_layout_is_what_it_prints() -> None:
    layout = Layout(2, 4, 8, recompute="block", sequence=False, micro_batch=3)
    assert parse(str(layout)) == layout
    assert parse(str(Layout())) == Layout()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tp", r"plan: a layout is NAME=VALUE,... of dp, .*; got 'tp'"),
        ("zp=2", r"plan: a layout is .*; got 'zp=2'"),
        ("tp=x", r"plan: tp must be an int; got 'x'"),
        ("tp=0", r"Layout: tp must be an int, at least 1; got 0"),
        ("recompute=3", r"Layout: recompute must be one of 0, 1, 2, block; got '3'"),
        ("reshard=1", r"plan: reshard must be true or false; got '1'"),
    ],
)
def test_words_that_are_no_layout(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        parse(words)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(tp=3), "plan: tp must divide n_head; got tp 3, n_head 8"),
        (Layout(cp=3), "plan: 2 cp must divide the sequence; got cp 3, 128 tokens"),
        (Layout(pp=5), "plan: pp must be at most 4 layers; got 5"),
        (Layout(pp=2, interleave=3), "plan: interleave must be at most a stage's 2 layers; got 3"),
    ],
    ids=str,
)
def test_layouts_that_cannot_hold_the_model(layout: Layout, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        estimate(GPT2, layout, T, 8, A100)


def test_clusters_are_as_published() -> None:
    """Peaks in TFLOP/s and bandwidths in GB/s of the data sheets."""
    for name, peak, bandwidth in (("a100", 312, 2039), ("h100", 989, 3350), ("b200", 2250, 8000)):
        assert CLUSTERS[name].peak_tflops == pytest.approx(peak, rel=0.02)
        assert CLUSTERS[name].bandwidth_gbs == bandwidth
    assert all(c.name == name for name, c in CLUSTERS.items())


def test_a_cluster_from_a_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "ours.yaml"
    file.write_text("base: h100\ninter_gbs: 12.5\ngpus_per_node: 4\n")
    assert cluster(str(file)) == replace(
        CLUSTERS["h100"], name="ours", inter_gbs=12.5, gpus_per_node=4
    )
    for text, message in (
        ("- 1\n", "must map names to numbers; got list"),
        ("a: [\n", "is no YAML"),
        ("base: h1000\n", "base must be one of v100, .*; got 'h1000'"),
        ("base: h100\ngpus: 4\n", "known are base, name, .*; got 'gpus'"),
        (
            "peak_tflops: 1\n",
            "lacks bandwidth_gbs, memory_gib, gpus_per_node, intra_gbs",
        ),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=f"^plan: .*{message}"):
            read(file)
    file.write_text("base: h100\ninter_gbs: fast\n")
    with pytest.raises(TypeError, match=r"^Cluster: inter_gbs must be a number; got 'fast'$"):
        read(file)
    with pytest.raises(ValueError, match=r"^Cluster: peak_tflops must be positive; got 0$"):
        replace(A100, peak_tflops=0)
    with pytest.raises(ValueError, match=r"^plan: the cluster must be one of v100, .*; got 'h1'$"):
        cluster("h1")
