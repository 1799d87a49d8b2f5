"""The command line: it works, and bad input is one line, exit code 2, nothing half-written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastgpt import GPT, cli
from fastgpt.train import DataConfig, ModelConfig, TrainConfig, Trainer, checkpoint, load
from fastgpt.train.run import prepare

TEXT = "\n\n".join(f"In year {n} a fox met {n * n} dogs; 白日依山尽 {n}." for n in range(300))
SHAPE = [
    "--data.vocab_size", "300", "--model.block_size", "16", "--model.n_layer", "1",
    "--model.n_head", "1", "--model.n_embd", "8", "--batch.rows", "2", "--device", "cpu",
]  # fmt: skip


def small() -> TrainConfig:
    shape = ModelConfig(block_size=16, n_layer=1, n_head=1, n_embd=8)
    return TrainConfig(device="cpu", model=shape, data=DataConfig(vocab_size=300))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = small()
    out = tmp_path_factory.mktemp("trained")
    trainer = prepare(config, [TEXT])
    trainer.step()
    saver = checkpoint.Checkpointer(out)
    trainer.save(saver, {})
    saver.wait()
    return out


@pytest.fixture
def checkpoint_copy(run_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint.find(run_folder), tmp_path / "copy"))


def command(*args: str, **options: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "fastgpt", *args],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Run a command that must be refused; return its one line."""
    assert cli.main(args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    return lines[0]


# --- what works -----------------------------------------------------------------------------------


def test_train_then_generate(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    args = [
        "train",
        "--data.files",
        str(text),
        "--out",
        str(out),
        "--steps",
        "6",
        "--log.every",
        "2",
    ]
    made = command(*args, *SHAPE)
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith("done: 6 steps, checkpoint ")
    assert "held-out loss" in made.stderr
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6, 6]

    ask = ["generate", "狐", "--model", str(out), "--seed", "1"]
    first, again = command(*ask), command(*ask)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("狐")
    assert len(first.stdout) > 2
    assert first.stdout == again.stdout


def test_a_configuration_is_a_file(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    args = ["train", "--data.files", str(text), "--out", str(out), "--steps", "2", *SHAPE]
    assert cli.main(args) == 0
    again = tmp_path / "again"
    assert cli.main(["train", "--config", str(out / "run.yaml"), "--out", str(again)]) == 0
    a, b = load(out)[0].state_dict(), load(again)[0].state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert cli.main(["train", "--config", str(again / "run.yaml"), "--resume"]) == 0


def test_several_files_are_trained_on(text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(TEXT.upper(), encoding="utf-8")
    out = tmp_path / "run"
    args = [
        "train",
        "--data.files",
        str(text),
        str(other),
        "--out",
        str(out),
        "--steps",
        "1",
        *SHAPE,
    ]
    assert cli.main(args) == 0
    pieces = load(out)[1].token_bytes
    assert b"YEAR" in b"".join(pieces)
    assert b"year" in b"".join(pieces)


def test_print_config_prints_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    import yaml  # type: ignore[import-untyped]

    made = command("train", "--model.n-layer", "3", "--print_config")
    assert made.returncode == 0
    printed = yaml.safe_load(made.stdout)
    assert printed["model"]["n_layer"] == 3
    assert printed["optim"]["lr"] == TrainConfig().optim.lr


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["demo", "--help"],
        ["prepare", "-h"],
        ["train", "-h"],
        ["generate", "-h"],
        ["lab", "-h"],
    ],
)
def test_help_helps(args: list[str]) -> None:
    made = command(*args)
    assert made.returncode == 0
    assert made.stdout.startswith("usage: fastgpt")
    assert made.stderr == ""


def test_samples_are_several_texts(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["generate", "ab", "--model", str(run_folder), "--seed", "3", "--max-new-tokens", "5"]
    assert cli.main([*args, "--n", "3"]) == 0
    texts = capsys.readouterr().out.split("\n---\n")
    assert len(texts) == len(set(texts)) == 3
    assert all(t.startswith("ab") for t in texts)


def test_greedy_needs_no_seed(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert cli.main(["generate", "--model", str(run_folder), "--temperature", "0"]) == 0
    out = capsys.readouterr().out
    half = len(out) // 2
    assert out[:half] == out[half:] != ""


def test_a_closed_pipe_is_no_error(run_folder: Path) -> None:
    args = [sys.executable, "-m", "fastgpt", "generate", "--model", str(run_folder)]
    process = subprocess.Popen(
        [*args, "a", "--n", "400", "--seed", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(60) == cli.PIPE_CLOSED


def test_ctrl_c_saves_and_resume_goes_on(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    args = ["train", "--data.files", str(text), "--out", str(out), "--steps", "100000", *SHAPE]
    args += ["--log.every", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastgpt", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    log = out / "log.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == cli.STOPPED
    assert "Traceback" not in errors
    assert said.startswith("stopped after ")
    step = int(said.split()[2])
    assert checkpoint.find(out).name == f"step-{step:08d}"


# --- what is refused ------------------------------------------------------------------------------


def test_a_refusal_is_one_line_without_a_traceback(tmp_path: Path) -> None:
    made = command(
        "train", "--data.files", str(tmp_path / "none.txt"), "--out", str(tmp_path / "run")
    )
    assert made.returncode == 2
    assert made.stdout == ""
    assert made.stderr.count("\n") == 1
    assert made.stderr.startswith("file: ")
    assert "Traceback" not in made.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["demo", "train"])
@pytest.mark.parametrize(
    "content, message",
    [
        (None, "file: {path} cannot be used; no such file or directory"),
        (b"", "text: {path} must hold some text; got 0 bytes of it"),
        (b"ab\xffcd", "text: {path} must be UTF-8 text; got byte 0xff at offset 2"),
        (b"\x89PNG\r\n\x1a\n\x00", "text: {path} must be UTF-8 text; got a zero byte at offset 8"),
        (
            b"Too short. " * 20,
            {
                "demo": "split: a text must be long enough to hold some of it out; got 220 char",
                "train": "data: there must be enough to hold some of it out, and to train on; got",
            },
        ),
        (
            b"a",
            {
                "demo": "split: a text must be long enough to hold some of it out; got 1 char",
                "train": "data: there must be enough to hold some of it out, and to train on; got",
            },
        ),
    ],
    ids=["missing", "empty", "no UTF-8", "binary", "short", "one letter"],
)
def test_bad_text_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    content: bytes | None,
    message: str | dict[str, str],
) -> None:
    message = message[command] if isinstance(message, dict) else message
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_bytes(content)
    before = list(tmp_path.iterdir())
    option = "--text" if command == "demo" else "--data.files"
    line = refused(capsys, command, option, str(path), "--out", str(tmp_path / "new" / "run"))
    assert line.startswith(message.format(path=path))
    assert list(tmp_path.iterdir()) == before


def test_a_folder_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "demo", "--text", str(tmp_path), "--out", str(tmp_path / "run"))
    assert line == f"file: {tmp_path} cannot be used; is a directory"


@pytest.mark.parametrize("command", ["demo", "train"])
def test_an_unwritable_folder_is_refused(
    text: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    option = "--text" if command == "demo" else "--data.files"
    args = [command, option, str(text), "--out", str(text / "run")]
    line = refused(capsys, *args, *(SHAPE if command == "train" else []))
    assert line == f"out: the folder must be writable; got {text / 'run'} (Not a directory)"
    assert text.read_text(encoding="utf-8") == TEXT


@pytest.mark.parametrize(
    "args, message",
    [
        (
            ["fly"],
            "fastgpt: the command must be one of demo, prepare, train, compress, generate, chat,",
        ),
        (["demo", "--minutes", "x"], "fastgpt demo: argument --minutes: invalid float value: 'x'"),
        (["demo", "--minutes", "0"], "train: max_seconds must be positive; got 0.0"),
        (["prepare", "a.txt"], "fastgpt prepare: the following arguments are required: --out"),
        (["demo", "--fast"], "fastgpt demo: unrecognized arguments: --fast"),
        (["train"], "data: files must name at least one; got none"),
        (["train", "--optim.lr", "-1"], "optim: lr must be positive; got -1.0"),
        (["train", "--optim.lr", "fast"], "fastgpt train: "),
        (["train", "--speed", "1"], "fastgpt train: "),
        (["train", "--config", "/none.yaml"], "fastgpt train: "),
        (["train", "--device", "tpu9"], "train: the device must be one that is here; got 'tpu9'"),
        (["train", "--resume", "--out", "/none"], "checkpoint: /none must be a checkpoint"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_bad_options_are_refused(
    capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert refused(capsys, *args).startswith(message)


WEIGHTS = "model/shard-00001-model-00001-of-00001.safetensors"


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "tokenizer.json"])
@pytest.mark.parametrize("content", [None, b"", b"{}", b"\x80\x04K\x01."], ids=str)
def test_a_broken_checkpoint_is_refused(
    checkpoint_copy: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None
) -> None:
    (checkpoint_copy / name).unlink()
    if content is not None:
        (checkpoint_copy / name).write_bytes(content)
    line = refused(capsys, "generate", "--model", str(checkpoint_copy))
    assert line.startswith("checkpoint: ")
    assert str(checkpoint_copy) in line


def test_a_trained_model_is_exported(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "hf"
    assert cli.main(["export", "--checkpoint", str(run_folder), "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: model.safetensors")
    again, trained = GPT.from_pretrained(out), checkpoint.load(run_folder)[0]
    assert all(torch.equal(v, trained.state_dict()[k]) for k, v in again.state_dict().items())
    line = refused(capsys, "export", "--best", "--checkpoint", str(run_folder), "--out", str(out))
    assert line == f"export: --best needs a run with a held-out loss; got {run_folder}"


def test_a_second_run_does_not_overwrite_the_first(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [
        "train",
        "--data.files",
        str(text),
        "--out",
        str(tmp_path / "run"),
        "--steps",
        "1",
        *SHAPE,
    ]
    assert cli.main(args) == 0
    capsys.readouterr()
    assert refused(capsys, *args).startswith("train: out must not hold a run, except to resume it")


def test_a_full_disk_is_said(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resource = pytest.importorskip("resource")
    out = tmp_path / "run"
    args = ["train", "--data.files", str(text), "--out", str(out), "--steps", "1", *SHAPE]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))  # of any file, in bytes
    try:
        assert cli.main(args) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "checkpoint: step 1 is not saved; File too large"
    assert not list(out.glob("*step-*"))


def test_import_is_cheap_and_asks_nothing() -> None:
    code = (
        "import sys, fastgpt, torch; heavy = {'triton', 'transformers', 'tokenizers',"
        " 'jsonargparse', 'yaml'};"
        " assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        " assert not torch.cuda.is_initialized();"
        " assert fastgpt.compress is sys.modules['fastgpt.compress'].compress"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


def test_a_trainer_can_be_made_without_a_file() -> None:
    config = small()
    assert isinstance(prepare(config, [TEXT]), Trainer)
