"""`fastgpt plan`, and that docs/plan.md is what it says."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

from fastgpt import cli
from fastgpt.config import GPTConfig
from fastgpt.ops.backend import INTERPRET
from fastgpt.plan.clusters import CLUSTERS, cluster
from fastgpt.plan.layout import parse
from fastgpt.plan.published import SLOWER, SOURCES, left_out, runs, spread
from tests.conftest import HAS_CUDA, ROOT

pytestmark = pytest.mark.skipif(HAS_CUDA or INTERPRET, reason="fake tensors, without a GPU")

PAGE = ROOT / "docs" / "plan.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.read_text().split("fastgpt plan published -->")[-1].splitlines()
    if line.startswith("|")
][2:]  # fmt: skip


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    code = cli.main(["plan", *words])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


def test_the_best_layout_and_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "gpt2", "--cluster", "a100", "--gpus", "2", "--recompute", "1", "--top", "2")
    assert out.startswith(
        "gpt2: 0.1244 B parameters; 0.524 M tokens a step, 1024 a sequence\na100:"
    )
    assert re.search(r"^best of \d+ layouts that fit 2: \w+=", out, re.M)
    for word in ("memory: ", "sends: ", "step: at least", "MFU: at most", "binds: "):
        assert re.search(rf"^  {word}", out, re.M), word
    table = out.split("\n\n")[2].splitlines()
    assert table[0].split()[0] == "layout" and len(table) == 3
    assert "published runs took" in out


def test_json_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    words = ["tiny", "--gpus", "1,2", "--recompute", "1", "--batch", "16384", "--tokens", "1e9"]
    out = run(capsys, *words, "--json", str(file))
    said = json.loads(file.read_text())
    assert json.loads(run(capsys, *words, "--json", "-")) == said
    assert said["token_budget"] == 1e9 and [p["gpus"] for p in said["plans"]] == [1, 2]
    for plan, line in zip(said["plans"], out.split("\n\n")[1].splitlines()[1:], strict=True):
        best = plan["layouts"][0]
        assert best["seconds"]["step"] == pytest.approx(
            sum(s for part, s in best["seconds"].items() if part != "step")
        )
        assert best["memory_bytes"]["total"] == pytest.approx(
            sum(b for part, b in best["memory_bytes"].items() if part != "total")
        )
        assert plan["days"] == pytest.approx(1e9 / best["tokens_per_second"] / 86400)
        flops = GPTConfig.preset("tiny").flops(256, training=True) * best["sequences_per_step"]
        peak = plan["gpus"] * plan["cluster"]["peak_tflops"] * 1e12
        assert best["mfu_ceiling"] == pytest.approx(flops / best["seconds"]["step"] / peak)
        layout = {k: v for k, v in best["layout"].items() if v != 1}
        assert line.split()[0] == (str(parse(line.split()[0])))
        assert all(getattr(parse(line.split()[0]), k) == v for k, v in layout.items())


def test_one_layout_of_a_model_from_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "small.yaml"
    file.write_text("variant: llama\nn_layer: 2\nn_head: 4\nn_embd: 128\nvocab_size: 512\n")
    out = run(capsys, str(file), "--layout", "fsdp=2,tp=2", "--sequence", "256", "--batch", "4096")
    assert "small: 0.0004922 B" in out and "best of 1 layouts that fit 4: fsdp=2,tp=2" in out
    out = run(capsys, "gpt3-13b", "--layout", "micro_batch=2", "--batch", "4096")
    assert re.match(r"plan: micro_batch=2 takes 2\d\d\.\d GiB; 76\.0 are left for tensors\n", out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gpt5"], "GPTConfig: the preset must be one of tiny, .*; got 'gpt5'"),
        (["gpt2", "--gpus", "0"], "plan: --gpus must be numbers from 1 to 32768; got '0'"),
        (["gpt2", "--gpus", "8,many"], "plan: --gpus must be numbers .*; got '8,many'"),
        (["gpt2", "--cluster", "h1"], "plan: the cluster must be one of v100, .*; got 'h1'"),
        (["gpt2", "--cluster", "no.yaml"], "file: no.yaml cannot be used; no such file .*"),
        (["gpt2", "--batch", "0.5"], "plan: --batch must be at least 1; got 0.5"),
        (["gpt2", "--layout", "tp=5"], "plan: tp must divide n_head; got tp 5, n_head 12"),
        (["gpt3-175b", "--gpus", "8"], "plan: 175 B parameters do not fit on 8 x h100 of 80 GiB in"
         r" any layout; the smallest number on which one does is \d+"),
        (["update", "README.md"], "plan update: README.md has no <!-- made by: .*"),
        ([], "fastgpt plan: the following arguments are required: MODEL; see .*"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_bad_input_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(ROOT)
    assert cli.main(["plan", *words]) == 2
    assert re.fullmatch(message + "\n", capsys.readouterr().err)


def test_help_does_not_import_torch() -> None:
    """The package itself does; of what the command adds, nothing may."""
    code = (
        "import sys, types\n"
        f"package = types.ModuleType('fastgpt'); package.__path__ = [{str(ROOT / 'fastgpt')!r}]\n"
        "sys.modules['fastgpt'] = package\n"
        "from fastgpt.cli import main\n"
        "try: main(['plan', '--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'triton', 'yaml'} & set(sys.modules)))"
    )
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert got.stdout.endswith("\n[]\n"), got.stdout[-200:] + got.stderr
    assert all(name in got.stdout for name in CLUSTERS)


def test_published_runs_have_a_source_and_a_step_of_the_published_batch() -> None:
    assert {run.source for run in runs()} == {source.key for source in SOURCES}
    for one in runs():
        layout = parse(one.layout)
        assert one.sequences % (layout.data * layout.micro_batch) == 0, one.name
        assert layout.obstacle(one.config, one.T) is None


def test_published_figures_agree_with_each_other() -> None:
    """Steps were worked out from some figures; the same papers print others."""
    steps = {(one.source, one.name, parse(one.layout).world): one for one in runs()}

    def tflops(source: str, name: str, world: int) -> float:
        one = steps[source, name, world]
        return one.config.flops(one.T, training=True) * one.sequences / one.seconds / world / 1e12

    # Model FLOP/s a device; papers count attention whole and some recomputation, so within 7 %.
    assert tflops("Patterson 2021", "GPT-3 175B", 10000) == pytest.approx(24.6, rel=0.07)
    assert tflops("Chowdhery 2022", "PaLM 540B", 6144) == pytest.approx(0.462 * 275, rel=0.07)
    for name, world, mfu in (("GPT 22B", 8, 0.415), ("GPT 175B", 64, 0.514),
                             ("GPT 530B", 280, 0.560), ("GPT 1T", 512, 0.563)):  # fmt: skip
        assert tflops("Korthikanti 2022", name, world) == pytest.approx(mfu * 312, rel=0.07)
    assert tflops("Narayanan 2021", "GPT 1008B", 3072) == pytest.approx(163 * 0.75, rel=0.07)
    assert tflops("Smith 2022", "MT-NLG 530B", 2240) == pytest.approx(126 * 0.75, rel=0.07)


def test_the_table_in_docs_is_current_where_it_is_quick() -> None:
    """Two rows; the whole page in the next test, which is slow."""
    assert len(ROWS) == len(runs())
    for at in (11, 16):
        one, cells = runs()[at], ROWS[at]
        made = one.estimate()
        ratio = one.seconds / made.step
        assert cells[0] == one.name and cells[2].strip("`*") == str(made.layout)
        assert cells[3:8] == [
            f"{one.seconds:.2f} s", f"{made.mfu / ratio:.1%}", f"{made.step:.2f} s",
            f"{made.mfu:.1%}", f"{ratio:.2f}",
        ]  # fmt: skip


def test_what_is_said_of_published_runs_is_in_the_table() -> None:
    ratios = [float(cells[7]) for cells in ROWS]
    assert spread(ratios) == pytest.approx(SLOWER, abs=0.011)
    assert min(ratios) >= 1, "a bound that a published run passed is none"
    said = PAGE.read_text()
    assert f"from {SLOWER[0]:.2f} to {SLOWER[2]:.2f}, of {len(ROWS)} runs" in said
    errors = re.search(r"by (\d+)% in the median, by (\d+)% at most", said)
    assert errors is not None
    found = left_out(ratios)
    assert [int(n) for n in errors.groups()] == pytest.approx(
        [100 * median(found), 100 * max(found)], abs=1.5
    )


def test_left_out() -> None:
    assert left_out([1.0, 2.0, 4.0]) == pytest.approx([2.0, 0.25, 0.625])


@pytest.mark.slow
def test_the_page_is_current(tmp_path: Path) -> None:
    copy = tmp_path / "plan.md"
    shutil.copy(PAGE, copy)
    assert cli.main(["plan", "update", str(copy)]) == 0
    assert copy.read_text() == PAGE.read_text(), "stale: fastgpt plan update docs/plan.md"


def test_the_pages_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    exec(block, {})
    assert re.match(r"fsdp=\S+ [\d.]+ s, MFU at most \d+% compute", capsys.readouterr().out)


def test_every_cluster_of_the_help_is_there() -> None:
    assert all(cluster(name).name == name for name in CLUSTERS)
