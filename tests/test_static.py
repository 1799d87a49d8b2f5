"""The harness of the goals' table: what it counts, what it holds against what, what it writes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import nn

from benchmarks import error_growth
from benchmarks.peers import calls, child
from benchmarks.static import __main__ as command
from benchmarks.static import kernels, report, step
from benchmarks.static.kernels import Best, Peers, Thing
from fastgpt import ops, use
from fastgpt.lab import analyse, cases
from fastgpt.lab.result import Cost, Counts, Row, to_json
from fastgpt.ops.backend import INTERPRET
from tests.conftest import HAS_CUDA, ROOT

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(HAS_CUDA or INTERPRET, reason="compiles on CPU tensors, without a driver"),
]


# Launches


def names(call: Any) -> list[str]:
    with step.Launches() as mode:
        call()
    return [name.split(".")[1] for name in mode.names]


def test_views_allocation_and_reads_are_no_launches() -> None:
    x = torch.ones(4, 6)
    assert names(lambda: x.view(6, 4).t()[1:].unsqueeze(0).expand(2, 3, 6).detach()) == []
    assert names(lambda: (torch.empty(3), torch.empty_like(x), x.new_empty(2))) == []
    assert names(lambda: float(x[0, 0])) == []
    assert names(lambda: x.reshape(24)) == []


def test_what_writes_or_makes_memory_is_a_launch_each() -> None:
    x = torch.ones(4, 6)
    assert names(lambda: x.add_(1)) == ["add_"]
    assert names(lambda: x + x) == ["add"]
    assert names(lambda: x.t().contiguous()) == ["clone"]
    assert names(lambda: torch.zeros(3)) == ["zeros"]
    assert names(lambda: x.to(torch.float16)) == ["_to_copy"]


def test_an_op_of_fastgpt_counts_by_its_kernels_and_what_else_it_calls() -> None:
    x, w = torch.ones(4, 16, requires_grad=True), torch.ones(16, requires_grad=True)

    def call() -> None:
        ops.layer_norm(x, w, w).backward(torch.ones(4, 16))

    counted = step.count("fastgpt", call, kernels=True)
    assert counted.kernels == 3  # forward, backward, sums of the partial gradients
    # The gradient made here, and once each the accumulation into x and twice into w: the bias is w.
    assert counted.operators <= 5


def test_multi_tensor_operators_count_as_often_as_aten_launches_them() -> None:
    assert step.pieces([1], 1) == 1
    assert step.pieces([1] * 110, 1) == 1 and step.pieces([1] * 111, 1) == 2
    assert step.pieces([1] * 37, 4) == 2
    assert step.pieces([65536 * 320], 1) == 1 and step.pieces([65536 * 320 + 1], 1) == 2
    assert step.pieces([65536 * 640], 1) == 2
    assert len(step.GPT2_SIZES) == 148 and sum(step.GPT2_SIZES) == 124_439_808


def test_a_step_of_plain_pytorch_counts_its_operators() -> None:
    model = step.Plain(1, 2, 16, 32, 16)
    one = step.count("plain", step.training_step(model, "foreach"))
    two = step.count("plain", step.training_step(step.Plain(2, 2, 16, 32, 16), "foreach"))
    # A layer: 2 layer norms, 4 products and GELU, SDPA, 2 sums; about twice that in backward.
    assert 20 <= two.operators - one.operators <= 40
    assert one.kernels == 0 and one.extra > 0 and one.split == one.launches + one.extra


def test_bytes_for_backward_of_a_layer() -> None:
    class Squares(nn.Module):
        def __init__(self, layers: int, *shape: int) -> None:
            super().__init__()
            self.layers, self.wte = layers, nn.Embedding(shape[2], shape[1])

        def forward(self, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            x = self.wte(idx)
            for _ in range(self.layers):
                x = x.square()
            return x.sum()

    assert step.a_layers_bytes(Squares) == 2 * 768  # the input of one square, bfloat16


# Kernels


def row(kernel: str = "a.k", target: str = "sm_80", **how: Any) -> Row:
    cost = Cost({"issue": 2.0}, "issue", 1, 1.0, how.pop("ceiling", 1.0), how.pop("serial", 0.5),
                "tensor")  # fmt: skip
    return Row(kernel, target, shared_limit=100, cost=cost, **how)


def test_the_best_of_a_peer_spills_nothing_and_fits() -> None:
    key = ("sm_80", "attention, forward", "64", "a")
    spilling = row(spills=8, serial=0.9)
    large = row(shared=101, serial=0.8)
    slow, good = row(serial=0.4), row(serial=0.6, ceiling=0.7)
    failed = Row("a.k", "sm_80", error="does not compile")
    found = Peers({key: [spilling, large, slow, good, failed]})
    thing = Thing("attention, forward", "64", "", "", "attention")
    best = kernels.best(found, "sm_80", thing)
    assert best is not None and best.rows == (good,) and best.who == "a"
    only_spilling = Peers({key: [spilling]})
    best = kernels.best(only_spilling, "sm_80", thing)
    assert best is not None and best.spills == 8
    assert kernels.best(found, "sm_90", thing) is None


def test_kernels_that_do_one_thing_together_add_up_and_the_fewest_instructions_win() -> None:
    what = "cross-entropy, loss and gradient"
    parts = [row("b.fwd", per_element=10.0), row("b.bwd", per_element=12.0, budget=30.0)]
    found = Peers(
        {("sm_80", what, "50257", "a"): [row(per_element=23.0)],
         ("sm_80", what, "50257", "b"): [*parts, row("b.bwd", per_element=11.0)]}
    )  # fmt: skip
    best = kernels.best(found, "sm_80", Thing(what, "50257", "", "", "element"))
    assert best is not None and best.who == "b" and best.per_element == 21.0


def test_goals_of_attention_and_rows() -> None:
    thing = Thing("attention, forward", "64", "", "", "attention")
    mine = Best("fastgpt", (row(ceiling=1.0, serial=0.50, per_element=9.0),))
    peer = Best("a", (row(ceiling=0.9, serial=0.55, per_element=10.0),))
    met = {line.goal: line.met for line in kernels.of_thing(thing, "sm_80", mine, peer)}
    assert met == {"U_max": True, "U_ser": False, "instructions per exponential": True}
    serial = kernels.of_thing(thing, "sm_80", mine, peer)[1]
    assert serial.short == "9% short; issue binds"
    wide = Counts({"global_load": 3}, widths={"global_load": {16: 2, 4: 1}})
    thing = Thing("layer norm, forward", "768", "", "", "element")
    mine = Best("fastgpt", (row(per_element=8.1, budget=9.0, whole=wide),))
    met = {line.goal: line.met for line in kernels.of_thing(thing, "sm_80", mine, peer)}
    assert met == {
        "instructions an element": False,
        "under the memory's budget": True,
        "16-byte share of the bytes": False,  # 32 of 36 bytes
    }
    alone = kernels.of_thing(thing, "sm_80", mine, None)
    assert [line.met for line in alone] == [None, True, False]


def test_a_bulk_copy_is_wide() -> None:
    assert kernels.wide_bytes(Counts(widths={"global_async": {0: 1}, "global_load": {4: 9}})) == 1.0
    assert kernels.wide_bytes(Counts(widths={"global_load": {16: 1, 8: 2}})) == 0.5


def test_a_kernel_of_ours_through_the_harness() -> None:
    thing = next(t for t in kernels.things() if t.what == "layer norm, forward" and t.at == "768")
    (launch,) = [one for one in cases.launches(thing.op, "sm_90") if "_fwd" in one.name]
    (compiled,) = analyse.rows([(launch, "sm_90")], workers=0)
    (line,) = kernels.compiled([compiled])
    assert line.met and compiled.per_element is not None
    lines = kernels.compared(Peers(), ["sm_90"], [(thing, compiled)])
    assert [line.ours for line in lines[:2]] == [compiled.per_element] * 2
    heads, cells = report.matrix(lines, ["sm_90"])
    assert heads == ["what", "size", "goal", "sm_90", "peers"] and len(cells) == 3


# Peers


def test_a_peers_launch_is_its_own_and_carries_what_it_works_through() -> None:
    pytest.importorskip("liger_kernel")
    call = next(calls.liger())
    assert (call.what, call.at, call.peer) == ("layer norm, forward", "768", "liger")
    (launch,) = child.launches(call, "sm_90")
    assert launch.name == "liger._layer_norm_forward_kernel" and launch.grid == (8192, 1, 1)[:1]
    assert launch.elements is not None and launch.elements.launch == 8192 * 768


def test_what_a_child_says_is_read_back() -> None:
    about = {"what": "layer norm, forward", "at": "768", "peer": "a"}
    found = Peers()
    found.read("sm_80", json.dumps({**about, "row": to_json(row())}))
    found.read("sm_80", json.dumps({**about, "error": "ValueError: no"}))
    found.read("sm_80", json.dumps({"peer": "b", "error": "ModuleNotFoundError: no b"}))
    assert found.rows == {("sm_80", "layer norm, forward", "768", "a"): [row()]}
    assert found.missing["b"] == "ModuleNotFoundError: no b"


SCRIPT = """import triton
import triton.language as tl
import a_package_that_is_not_there

LIMIT = 4
other = a_package_that_is_not_there.f()

@a_package_that_is_not_there.tuned
@triton.jit
def kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), 1.0)

def wrapper():
    a_package_that_is_not_there.launch(kernel)

wrapper()
"""


def test_a_file_gives_its_kernels_without_its_imports(tmp_path: Path) -> None:
    file = tmp_path / "package" / "ops" / "some_peers_file.py"
    file.parent.mkdir(parents=True)
    file.write_text(SCRIPT)
    module = calls.kernels_of(file)
    assert type(module.kernel).__name__ == "JITFunction" and module.LIMIT == 4
    assert not hasattr(module, "wrapper") and not hasattr(module, "other")
    assert module.kernel.fn.__code__.co_firstlineno == 9  # the lines are the file's


def test_a_script_gives_its_definitions_and_does_not_run(tmp_path: Path) -> None:
    file = tmp_path / "some_script.py"
    file.write_text("def f():\n    return 1\n\nraise_error = f\nprint(1 / 0)\n")
    assert calls.without_calls(file).f() == 1


# The page


def test_the_tables_go_between_the_pages_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{command.BEGIN}\nold\n{command.END}\nafter\n")
    monkeypatch.setattr(kernels, "peers", lambda *how: Peers())
    thing = next(t for t in kernels.things() if t.what == "attention, forward" and t.at == "64")
    mine = row("attention._fwd_kernel", "sm_90", per_element=7.0)
    monkeypatch.setattr(kernels, "ours", lambda *how, **more: ([mine], [(thing, mine)]))
    argv = ["--target", "sm_90", "--only", "attention", "--skip", "step"]
    argv += ["--markdown", str(page)]
    assert command.main(argv) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{command.BEGIN}\n") and text.endswith("-->\nafter\n")
    assert "old" not in text and "| attention, forward | 64 | U_ser | 0.50 – |" in text
    assert "compiles, fits, spills nothing" in capsys.readouterr().out


PAGE = ROOT / "docs" / "performance.md"
MADE_WITH = re.search(r"^Made with Triton ([\d.]+),", PAGE.read_text(), re.M)


def test_the_page_says_of_a_few_kernels_what_they_are() -> None:
    """Cheap: one size on one chip. `python -m benchmarks.static --markdown` writes the page."""
    assert MADE_WITH is not None
    if triton.__version__ != MADE_WITH[1]:
        pytest.skip(f"docs/performance.md is of Triton {MADE_WITH[1]}")
    table = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    heads = next(row for row in table if "sm_80" in row)
    at = heads.index("sm_80")
    for what, size in (("layer norm, forward", "768"), ("attention, forward", "64")):
        thing = next(t for t in kernels.things() if (t.what, t.at) == (what, size))
        launches = [
            one for one in cases.launches(thing.op, "sm_80") if re.search(thing.kernels, one.name)
        ]
        rows = analyse.rows([(one, "sm_80") for one in launches], workers=0)
        lines = kernels.of_thing(thing, "sm_80", Best("fastgpt", tuple(rows)), None)
        for line in lines:
            row = next(r for r in table if r[:3] == [f"| {what}", size, line.goal])
            assert row[at].split()[0] == report.shown(line.ours), f"stale: {what} {line.goal}"


def test_errors_do_not_outgrow_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figure's numbers at small sizes, on the reference path: both are PyTorch's operators."""
    monkeypatch.setattr(error_growth, "use", lambda path: use("reference"))
    panels = error_growth.growths(most=64)
    series = error_growth.measure(panels)
    for *_, kernel, theirs in error_growth.worst([p for p in panels if p.sizes], series):
        assert kernel <= 2 * theirs + 1e-6 and theirs < 1e-2
