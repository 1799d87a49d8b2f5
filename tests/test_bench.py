"""fastgpt bench: what is gated, counted, written and compared. No test looks at a speed."""

import dataclasses
import json
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt.bench import cli, models, players, plot, positions, result, stats, timing
from fastgpt.bench.case import Case
from fastgpt.bench.compare import compare, differences
from fastgpt.bench.measure import Rounds, Setting
from fastgpt.bench.ops import OPS
from fastgpt.bench.report import MARKS
from fastgpt.bench.result import Row, Run
from fastgpt.bench.run import Planned, Session, Wanted, fake, make, plan, too_large
from fastgpt.config import GPTConfig

SMALL: dict[str, dict[str, int]] = {
    "attention": {"B": 1, "T": 5, "H": 2, "D": 8},
    "attention_decode": {"B": 2, "S": 9, "L": 5, "H": 4, "Hkv": 2, "D": 8},
    "layer_norm": {"M": 3, "N": 8},
    "rms_norm": {"M": 3, "N": 8},
    "ffn": {"M": 3, "C": 8},
    "linear_cross_entropy": {"M": 5, "C": 8, "V": 11},
    "cross_entropy": {"M": 5, "V": 11},
    "embedding": {"B": 2, "T": 3, "C": 8, "V": 11},
    "rotary": {"B": 1, "T": 3, "H": 4, "Hkv": 2, "D": 8, "norm": 1},
    "quantized_linear": {"M": 3, "N": 16, "K": 32, "bits": 4},
    "adamw": {"C": 8, "L": 1, "V": 16},
}
GPT = {"B": 2, "T": 8, "L": 1, "H": 2, "C": 16, "V": 32}


def setting(rounds: int = 6, dtype: str = "float32") -> Setting:
    return Setting("cpu", dtype, rounds, {"gemm_flops": 1e9, "copy_bytes": 1e9})


def measured(work: Any, mode: str, providers: set[str], rounds: int = 6) -> dict[str, Row]:
    each = Rounds(work, mode, providers, setting(rounds))
    assert len(list(each.run())) <= len(each)
    return {row.provider: row for row in each.rows()}


def square(change: Callable[[Tensor], Tensor]) -> Case:
    """torch's square, and others' whose values are changed."""
    providers: dict[str, Callable[..., Tensor]] = {
        "torch": lambda x: x * x,
        "changed": lambda x: change(x * x),
    }
    return Case("square", {"N": 4}, providers, {"x": torch.randn(4, 3)}, "torch", flops=12)


# --- the gate -------------------------------------------------------------------------------------


def test_what_differs_is_not_timed() -> None:
    rows = measured(square(lambda y: y * 1.01), "forward", {"torch", "changed"})
    assert rows["torch"].state == "timed" and len(rows["torch"].samples) == 6
    refused = rows["changed"]
    assert (refused.state, refused.samples, refused.median) == ("refused", [], None)
    assert "values differ from torch's by 0.01, more than 0.001" in refused.why


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_timed(bad: float) -> None:
    rows = measured(square(lambda y: y + bad), "forward", {"torch", "changed"})
    assert rows["changed"].state == "refused"


def test_another_shape_is_not_timed() -> None:
    rows = measured(square(lambda y: y[:1]), "forward", {"torch", "changed"})
    assert rows["changed"].state == "refused"


@pytest.mark.parametrize("mode", ["backward", "both"])
def test_wrong_gradients_are_not_timed(mode: str) -> None:
    case = square(lambda y: y + 0 * y.detach() + (y - y.detach()) * 0.01)
    rows = measured(case, mode, {"torch", "changed"})
    assert rows["changed"].state == "refused" and "dx differ" in rows["changed"].why
    assert measured(case, "forward", {"changed"})["changed"].state == "timed"


def test_what_raises_is_said_and_the_others_are_timed() -> None:
    def fail(y: Tensor) -> Tensor:
        raise RuntimeError("no such thing\nand more lines")

    rows = measured(square(fail), "both", {"torch", "changed"})
    assert rows["torch"].state == "timed"
    assert (rows["changed"].state, rows["changed"].why) == ("failed", "RuntimeError: no such thing")


# --- the cases ------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_every_op_runs_in_every_mode(op: str) -> None:
    case = make(Planned(op, "float32", SMALL[op]), "cpu")
    eager = {p for p in case.offers if p != "compiled"}
    for mode in case.modes:
        rows = measured(case, mode, eager | set(case.absent), rounds=1)
        for provider, row in rows.items():
            assert row.state == ("absent" if provider in case.absent else "timed"), row
            assert row.state == "timed" or row.why
            assert (row.saved_bytes is not None) == (row.state == "timed" and mode != "forward")
    assert "fastgpt" in eager and len(eager) > 1


def test_names_on_the_command_line_are_those_of_the_package() -> None:
    assert tuple(OPS) == cli.OPS and models.MODELS == cli.MODELS


@pytest.mark.parametrize("what", models.MODELS)
def test_a_model_is_hugging_faces_and_nanogpts(what: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "model.py").write_text(NANOGPT)
    sizes = GPT | ({"N": 4} if what == "decode" else {})
    model = models.Model(what, "cpu", "float32", sizes, tmp_path)
    providers = {p for p in model.offers if not p.endswith("compiled")}
    assert providers - {"CTranslate2", "llama.cpp"} == {"fastgpt", "Hugging Face", "nanoGPT"}
    try:
        rows = measured(model, what, providers, rounds=1)
    finally:
        model.close()
    assert [(r.provider, r.state, r.why) for r in rows.values() if r.state != "timed"] == []
    assert rows["fastgpt"].tokens == (8 if what == "decode" else 16)


@pytest.mark.parametrize("what", models.MODELS)
def test_a_model_with_other_weights_is_not_timed(what: str) -> None:
    pytest.importorskip("transformers")
    model = models.Model(what, "cpu", "float32", GPT | {"N": 4})
    ours = players.Torch(model._role("fastgpt"))
    with torch.no_grad():
        ours.model.get_parameter("h.0.mlp.c_fc.weight").normal_(0, 3)
    model._players["fastgpt", "float32"] = ours
    try:
        rows = measured(model, what, {"fastgpt", "Hugging Face"}, rounds=1)
    finally:
        model.close()
    assert rows["fastgpt"].state == "refused", rows["fastgpt"]
    assert rows["Hugging Face"].state == "timed"


def test_flops_bytes_and_shares() -> None:
    case = square(lambda y: y)
    row = measured(case, "both", {"torch"})["torch"]
    numbers = 12 * 4
    assert (row.flops, row.bytes) == (3 * 12, (numbers * 2) + (numbers * 3))
    assert row.median is not None and row.tflops == pytest.approx(36 / row.median / 1e12)
    assert row.of_gemm == pytest.approx(36 / row.median / 1e9)
    assert row.of_copy == pytest.approx(240 / row.median / 1e9)


def test_peak_bytes_are_of_what_lives_at_once() -> None:
    x = torch.zeros(1000)

    def step() -> Tensor:
        y = x + 1
        z = y * 2  # y and z: 8000 bytes
        del y
        return z.add_(1)[:10]

    assert timing.peak_bytes(step, "cpu") == 8000


def test_saved_bytes_are_without_the_inputs() -> None:
    case = square(torch.exp)
    assert case.saved("torch") == 0 and case.saved("changed") == 4 * 12


# --- planning -------------------------------------------------------------------------------------


def test_a_sweep_is_every_combination() -> None:
    wanted = Wanted(
        ("attention", "rms_norm"), "cpu", ("float32",), sweep=(("T", (8, 16)), ("B", (1, 2)))
    )
    found = [p.sizes for p in plan(wanted)]
    assert [(s["B"], s["T"], s["H"]) for s in found[:4]] == [
        (1, 8, 12),
        (2, 8, 12),
        (1, 16, 12),
        (2, 16, 12),
    ]
    assert found[4:] == OPS["rms_norm"].sizes("cpu")


def test_what_does_not_fit_is_said_before_it_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = Planned("attention", "float32", {"B": 1, "T": 4096, "H": 4, "D": 64})
    monkeypatch.setattr(timing, "free_bytes", lambda device: 100 << 20)
    asked = too_large(planned, "cpu", "forward")
    assert asked("fastgpt") is None
    assert "needs at least 0." in (asked("reference") or "")  # 4 x 4096 x 4096 floats
    sweep = (("B", (64,)), ("T", (4096,)), ("H", (64,)))
    session = Session(Wanted(("attention",), "cpu", ("float32",), ("both",), sweep, ("fastgpt",)))
    session.run(lambda what: None, lambda: None)
    (row,) = session.rows
    # Three inputs, copies of them, their gradients, the output and more, each of 4 GiB.
    assert row.state == "failed" and float(row.why.split()[3]) >= 40


def test_a_size_that_is_wrong_fails_alone() -> None:
    wanted = Wanted(
        ("step", "rms_norm"), "cpu", ("float32",), rounds=1, providers=("fastgpt",),
        sweep=tuple((n, (v,)) for n, v in (GPT | {"C": 15, "M": 3, "N": 8}).items()),
    )  # fmt: skip
    session = Session(wanted)
    session.run(lambda what: None, lambda: None)
    assert [(r.what, r.state) for r in session.rows] == [("step", "failed"), ("rms_norm", "timed")]
    assert "n_head" in session.rows[0].why


def test_fake_cases_take_no_memory() -> None:
    case = fake(Planned("attention", "float32", {"B": 1024, "T": 4096, "H": 64, "D": 64}))[1]
    assert case.input_bytes == 3 * 1024 * 4096 * 64 * 64 * 4


# --- numbers --------------------------------------------------------------------------------------


def test_the_interval_of_a_median_holds_it_as_often_as_said() -> None:
    generator = torch.Generator().manual_seed(0)
    for n in (6, 11, 20):
        draws = torch.rand(2000, n, generator=generator).tolist()
        found = [stats.median_interval(values) for values in draws]
        inside = sum(low <= 0.5 <= high for low, high in found)  # type: ignore[misc]
        assert 0.94 < inside / 2000 <= 0.99, n
    assert stats.median_interval([1.0] * 5) is None
    assert stats.median_interval([6, 5, 4, 3, 2, 1]) == (1, 6)


def test_ratios_are_pair_by_pair() -> None:
    each = Rounds(square(lambda y: y), "forward", {"torch", "changed"}, setting(0))
    list(each.run())
    # A machine that slows down fourfold; one way takes twice as long throughout.
    each._samples = {"torch": [1.0, 2.0, 3.0, 4.0], "changed": [2.0, 4.0, 6.0, 8.0]}
    row = each.rows()[1]
    assert (row.base, row.ratio, row.median) == ("torch", 2.0, 5.0)


def test_a_stop_keeps_whole_rounds() -> None:
    calls = 0

    def stop(y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 1000:
            raise KeyboardInterrupt
        return y

    each = Rounds(square(stop), "forward", {"torch", "changed"}, setting(10**9))
    with pytest.raises(KeyboardInterrupt):
        list(each.run())
    one, other = each.rows()
    assert one.state == other.state == "timed"
    assert len(one.samples) == len(other.samples) > 0


# --- files ----------------------------------------------------------------------------------------


def run_of(scale: float, spread: float = 0.02, seed: int = 0, **changes: Any) -> Run:
    """A run of two rows; the second's times are scaled."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for n, factor in enumerate((1.0, scale)):
        noise = 1 + spread * torch.randn(20, generator=generator)
        samples = (1e-3 * factor * noise).tolist()
        low, median, high = stats.quartiles(samples)
        row = Row(
            "ffn",
            {"M": n},
            "float32",
            "forward",
            "fastgpt",
            "timed",
            "",
            samples,
            median,
            low,
            high,
        )
        more = {"peak_bytes": 1000} | (changes if n else {})
        rows.append(dataclasses.replace(row, **more))
    return Run(
        {"commit": "abc", "threads": "2"}, {"float32": {"gemm_flops": 1.0, "copy_bytes": 2.0}}, rows
    )


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = run_of(1.0)
    table = result.write(run, tmp_path / "a.json")
    assert result.read(tmp_path / "a.json") == run
    lines = table.read_text().splitlines()
    assert len(lines) == 3 and all(line.endswith(",abc,2") for line in lines[1:])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "a.json"]


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "is not JSON"),
        ("[]", "must have the format 'fastgpt bench 2'; got 'list'"),
        ('{"format": "fastgpt bench 1"}', "got 'fastgpt bench 1'"),
        ('{"format": "fastgpt bench 2"}', "is not whole"),
        ('{"format": "fastgpt bench 2", "rows": [{"who": 1}]}', "is not whole"),
    ],
)  # fmt: skip
def test_another_file_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        result.read(tmp_path / "a.json")


@pytest.mark.parametrize("scale, word", [(1.2, "slower"), (1 / 1.2, "faster")])
def test_a_planted_change_is_found(scale: float, word: str) -> None:
    (moved,) = compare(run_of(1.0), run_of(scale, seed=1))
    assert moved.row.sizes == {"M": 1} and moved.said.startswith(word)
    assert moved.worse == (word == "slower")


def test_noise_alone_is_no_change() -> None:
    for seed in range(20):
        assert compare(run_of(1.0, 0.1, seed), run_of(1.0, 0.1, seed + 100)) == []


def test_a_difference_within_noise_is_no_change() -> None:
    assert compare(run_of(1.0, 0.5), run_of(1.1, 0.5, seed=1), least=0.0) == []


def test_memory_and_states_are_compared() -> None:
    (larger,) = compare(run_of(1.0), run_of(1.0, peak_bytes=1200))
    assert larger.worse and larger.said.startswith("peak bytes")
    (gone,) = compare(run_of(1.0), run_of(1.0, state="refused", why="values differ"))
    assert gone.worse and gone.said == "was timed, is refused: values differ"
    (back,) = compare(run_of(1.0, state="failed"), run_of(1.0))
    assert not back.worse


def test_other_machines_are_said() -> None:
    run = run_of(1.0)
    other = dataclasses.replace(
        run, facts=run.facts | {"threads": "4"},
        peaks={"float32": {"gemm_flops": 2.0, "copy_bytes": 2.0}}, complete=False,
    )  # fmt: skip
    said = list(differences(run, other))
    assert said[0] == "not the same threads: 2 -> 4"
    assert "product in float32: x 2.000" in said[1] and "stopped" in said[2]


@pytest.mark.parametrize("sizes", [1, 3])
def test_a_plot_is_drawn(sizes: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        dataclasses.replace(row, sizes={"M": 2**n}, provider=provider)
        for n in range(sizes)
        for provider in ("fastgpt", "torch")
        for row in run_of(1.0).rows[:1]
    ]
    plot.draw(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_step_is_timed_along_the_positions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, png = tmp_path / "page.md", tmp_path / "plot.png"
    page.write_text("\n".join(("before", *MARKS, "after")))
    config = GPTConfig(vocab_size=11, n_layer=1, n_head=2, n_embd=16, n_kv_head=1)
    positions.run((3, 400), 3, torch.float32, "cpu", page, png, config)
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[1] for line in lines] == ["3", "400"] * 2
    read = [p.cache for p in positions.measure((3, 400), 3, torch.float32, "cpu", config)]
    assert read == [2 * 8 * 4 * seen for seen in (4, 401, 4, positions.WINDOW)]
    assert page.read_text().count("| 400 |") == 2 and page.read_text().endswith("after")
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "argv, said",
    [
        (["step", "--positions", "4"], "--positions goes with decode alone"),
        (["decode", "--positions", "4", "--rounds", "2"], "at least 3 rounds"),
        (["decode", "--positions", "4", "--dtype", "int8"], "of 16 or 32 bits; got int8"),
    ],
)
def test_positions_that_cannot_be_timed_are_refused(argv: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        cli.main(argv, ArgumentParser)


def test_the_exponent_is_fitted_over_the_larger_half() -> None:
    x = [1.0, 2, 4, 8, 16]
    found = stats.fit(x, [100.0, 100, *(3 * n**2 for n in x[2:])])
    assert found is not None and (found.power, found.scale) == pytest.approx((2, 3))
    assert stats.fit([1], [1]) is None and stats.fit([1, 2], [0, 1]) is None
    assert stats.fit([4, 4], [1, 2]) is None
    with_two = [Row("ffn", {"M": m, "C": 4}, "float32", "both", "torch", "timed") for m in (1, 2)]
    assert plot.swept(with_two) == "M" and plot.swept(with_two[:1]) is None


def test_json_has_no_nan(tmp_path: Path) -> None:
    result.write(run_of(1.0), tmp_path / "a.json")

    def refuse(word: str) -> None:
        raise AssertionError(word)

    json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)


# nanoGPT's names and signatures, on torch's operators.
NANOGPT = '''
from dataclasses import dataclass
import torch
import torch.nn as nn
import torch.nn.functional as F

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        C = c.n_embd
        self.n_head = c.n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.c_attn, self.attn.c_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.mlp.c_fc, self.mlp.c_proj = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.attn.c_attn(self.ln_1(x)).split(C, 2)
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate="tanh"))

class GPT(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(c.vocab_size, c.n_embd), wpe=nn.Embedding(c.block_size, c.n_embd),
            h=nn.ModuleList(Block(c) for _ in range(c.n_layer)), ln_f=nn.LayerNorm(c.n_embd)))
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx, targets=None):
        t = self.transformer
        x = t.wte(idx) + t.wpe(torch.arange(idx.shape[1]))
        for block in t.h:
            x = block(x)
        x = t.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1]]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, idx, new, temperature=1.0, top_k=None):
        for _ in range(new):
            idx = torch.cat([idx, self(idx)[0][:, -1].argmax(-1, keepdim=True)], 1)
        return idx
'''  # fmt: skip
