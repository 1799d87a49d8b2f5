"""Checkpoints: whole or not there, for any number of ranks, and damage is seen and said."""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgpt.model import GPT, GPTConfig
from fastgpt.tokenizer import Tokenizer
from fastgpt.train import OptimConfig, checkpoint, load
from fastgpt.train.checkpoint import CheckpointConfig, Checkpointer, folder

SHAPE = GPTConfig(block_size=8, vocab_size=257, n_layer=2, n_head=2, n_embd=16)
TOKENIZER = Tokenizer.train(["abc"], 257)
NOW = CheckpointConfig(asynchronous=False)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model_of(seed: int = 0, shape: GPTConfig = SHAPE) -> GPT:
    torch.manual_seed(seed)
    return GPT(shape)


def optimizer_of(model: GPT) -> torch.optim.Optimizer:
    return model.configure_optimizer(1e-2)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> float:
    ids = torch.randint(0, 257, (2, 9), generator=torch.Generator().manual_seed(seed))
    loss = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def save(out: Path, at: int, seed: int = 0, loss: float | None = None, **options: Any) -> GPT:
    """A checkpoint after one step of training."""
    saver = Checkpointer(out, CheckpointConfig(**{"asynchronous": False, **options}))
    model = model_of(seed)
    optimizer = optimizer_of(model)
    step(model, optimizer, seed)
    saver.save(at, model, TOKENIZER, optimizer, {"note": "白"}, loss)
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(tmp_path / "run", 1)
    return checkpoint.find(tmp_path / "run")


def resum(at: Path) -> None:
    """Make a changed checkpoint one that was written so."""
    files = [p.relative_to(at).as_posix() for p in at.rglob("*") if p.is_file()]
    folder.write_sums(at, {n: folder.sha256(at / n) for n in files if n != "SHA256SUMS"})


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def names(out: Path) -> set[str]:
    return {p.name for p in out.iterdir()}


# --- what is saved --------------------------------------------------------------------------------


def test_a_checkpoint_is_what_was_saved(tmp_path: Path) -> None:
    trained = save(tmp_path, 7)
    model, tokenizer = load(tmp_path)
    assert model.config == SHAPE
    assert same(model.state_dict(), trained.state_dict())
    assert all(p.requires_grad for p in model.parameters())
    assert tokenizer.token_bytes == TOKENIZER.token_bytes
    at = tmp_path / "step-00000007"
    assert same(load(at)[0].state_dict(), trained.state_dict())
    assert names(tmp_path) == {"step-00000007"}
    assert names(at) == {
        "config.json", "tokenizer.json", "train.json", "SHA256SUMS", "model", "optimizer"
    }  # fmt: skip
    # Plain safetensors, which any tool reads.
    (file,) = (at / "model").iterdir()
    assert same(load_file(file), trained.state_dict())
    assert checkpoint.read_json(at / "train.json") == {
        "note": "白", "step": 7, "held_out_loss": None
    }  # fmt: skip


def test_the_sums_are_coreutils_own(saved: Path) -> None:
    if (tool := shutil.which("sha256sum")) is None:
        pytest.skip("needs sha256sum")
    assert os.system(f"cd {saved} && {tool} --check --strict --quiet SHA256SUMS") == 0


@pytest.mark.parametrize("asynchronous", [False, True])
def test_training_goes_on_bit_for_bit(tmp_path: Path, asynchronous: bool) -> None:
    whole = model_of()
    optimizer = optimizer_of(whole)
    saver = Checkpointer(tmp_path, CheckpointConfig(asynchronous=asynchronous))
    losses = []
    for n in range(6):
        if n == 3:
            saver.save(n, whole, TOKENIZER, optimizer)
        losses.append(step(whole, optimizer, n))  # changes what is being saved
    saver.wait()
    again = model_of(1)
    optimizer = optimizer_of(again)
    at = saver.latest()
    assert at is not None
    assert saver.load(at, again, optimizer)["step"] == 3
    assert [step(again, optimizer, n) for n in range(3, 6)] == losses[3:]
    assert same(again.state_dict(), whole.state_dict())


def test_what_is_saved_is_of_the_moment_of_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    go, begin = threading.Event(), folder.begin

    def late(*args: Any) -> Path:
        assert go.wait(60)
        return begin(*args)

    monkeypatch.setattr(folder, "begin", late)
    model = model_of()
    optimizer = optimizer_of(model)
    step(model, optimizer, 0)
    before = weights(model)
    saver = Checkpointer(tmp_path)
    saver.save(1, model, TOKENIZER, optimizer)
    step(model, optimizer, 1)
    assert not tmp_path.joinpath("step-00000001").exists()
    go.set()
    saver.wait()
    assert same(load(tmp_path)[0].state_dict(), before)
    assert not same(model.state_dict(), before)
    moments = load_file(next((tmp_path / "step-00000001" / "optimizer").iterdir()))
    assert {float(v) for k, v in moments.items() if k.startswith("step.")} == {1.0}


@pytest.mark.parametrize(
    "make",
    [
        lambda model: OptimConfig().build(model),
        lambda model: OptimConfig("muon").build(model),
        lambda model: torch.optim.AdamW(model.parameters(), fused=True),
        lambda model: torch.optim.Adam(model.parameters(), amsgrad=True),
        lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
        lambda model: torch.optim.SGD(model.parameters(), 0.1),
        lambda model: torch.optim.Adagrad(model.parameters()),
    ],
    ids=["own", "muon", "AdamW", "amsgrad", "momentum", "SGD", "Adagrad"],
)
def test_any_optimizer(tmp_path: Path, make: Any) -> None:
    a, b = model_of(0), model_of(1)
    one, two = make(a), make(b)
    step(a, one, 0)
    saver = Checkpointer(tmp_path, NOW)
    saver.save(1, a, TOKENIZER, one)
    saver.load(tmp_path / "step-00000001", b, two)
    assert step(a, one, 1) == step(b, two, 1)
    assert same(a.state_dict(), b.state_dict())


def test_sixteen_bit_weights_keep_their_float32_moments(tmp_path: Path) -> None:
    a, b = model_of(0).bfloat16(), model_of(1).bfloat16()
    one, two = optimizer_of(a), optimizer_of(b)
    step(a, one, 0)
    saver = Checkpointer(tmp_path, NOW)
    saver.save(1, a, TOKENIZER, one)
    saver.load(tmp_path / "step-00000001", b, two)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert two.state[q]["exp_avg"].dtype == torch.float32
        assert torch.equal(one.state[p]["exp_avg"], two.state[q]["exp_avg"])
    assert load(tmp_path)[0].wte.weight.dtype == torch.bfloat16


def test_parameters_without_a_gradient_and_options_stay(tmp_path: Path) -> None:
    a, b = model_of(0), model_of(1)
    for model in (a, b):
        model.wte.weight.requires_grad_(False)
    one, two = optimizer_of(a), a.configure_optimizer(5.0)
    two = b.configure_optimizer(5.0)
    step(a, one, 0)
    saver = Checkpointer(tmp_path, NOW)
    saver.save(1, a, TOKENIZER, one)
    saver.load(tmp_path / "step-00000001", b, two)
    assert two.param_groups[0]["lr"] == 5.0
    assert torch.equal(a.wte.weight, b.wte.weight)
    assert b.wte.weight not in two.state


def test_a_compiled_model_is_saved_under_its_own_names(tmp_path: Path) -> None:
    model = model_of()
    saver = Checkpointer(tmp_path, NOW)
    compiled = torch.compile(model)
    saver.save(1, compiled, TOKENIZER, optimizer_of(model))
    assert same(load(tmp_path)[0].state_dict(), model.state_dict())
    other = torch.compile(model_of(1))
    saver.load(tmp_path / "step-00000001", other)
    assert same(load(tmp_path)[0].state_dict(), model.state_dict())


# --- which are kept -------------------------------------------------------------------------------


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for n in range(1, 6):
        save(tmp_path, n, seed=n, keep=3)
        assert names(tmp_path) == {f"step-{i:08d}" for i in range(max(1, n - 2), n + 1)}


def test_the_best_is_kept(tmp_path: Path) -> None:
    for n, loss in enumerate([3.0, 1.0, 2.0, None, 1.5]):
        save(tmp_path, n, loss=loss, keep=1, best=True)
        best = checkpoint.best(tmp_path)
        assert best is not None and best.name == f"step-{min(n, 1):08d}"
        assert names(tmp_path) == {best.name, f"step-{n:08d}"}


def test_a_step_saved_again_replaces_the_first(tmp_path: Path) -> None:
    for seed in range(3):
        model = save(tmp_path, 4, seed, keep=1)
        assert len(names(tmp_path)) == 1
        assert same(load(tmp_path)[0].state_dict(), model.state_dict())


def test_checkpoints_of_a_run_given_up_go(tmp_path: Path) -> None:
    save(tmp_path, 9)
    model = save(tmp_path, 3, 1)
    assert names(tmp_path) == {"step-00000003"}
    assert same(load(tmp_path)[0].state_dict(), model.state_dict())


def test_what_a_torn_save_left_is_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000002")
    assert checkpoint.find(tmp_path).name == "step-00000001"
    save(tmp_path, 3)
    assert names(tmp_path) == {"step-00000001", "step-00000003"}


# --- damage ---------------------------------------------------------------------------------------

DAMAGES = ("missing", "empty", "cut", "longer", "flipped")


def every_file() -> list[str]:
    model, optimizer = (
        f"{part}/shard-00001-model-00001-of-00001.safetensors" for part in ("model", "optimizer")
    )
    return ["config.json", "tokenizer.json", "train.json", "SHA256SUMS", model, optimizer]


def damage(file: Path, how: str, at: float = 0.5) -> None:
    content = bytearray(file.read_bytes())
    bit = int(at * 8 * len(content))
    if how == "missing":
        file.unlink()
        return
    if how == "flipped":
        content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(
        {"empty": b"", "cut": content[: bit // 8], "longer": content + b"\n"}.get(how, content)
    )


@pytest.mark.parametrize("name", every_file())
@pytest.mark.parametrize("how", DAMAGES)
def test_damage_is_passed_over_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, how: str
) -> None:
    first, _ = save(tmp_path, 1, 1), save(tmp_path, 2, 2)
    damage(tmp_path / "step-00000002" / name, how)
    model = model_of(5)
    saver = Checkpointer(tmp_path, NOW)
    at = saver.latest()
    assert at == tmp_path / "step-00000001"
    (line,) = said(caplog)
    assert line.startswith(f"checkpoint: {tmp_path}/step-00000002 is damaged and passed over; ")
    assert "\n" not in line and name.split("/")[-1] in line
    assert saver.load(at, model, optimizer_of(model))["step"] == 1
    assert same(model.state_dict(), first.state_dict())
    with pytest.raises(ValueError, match=r"^checkpoint: [^\n]*$"):
        saver.load(tmp_path / "step-00000002", model)
    saver.save(2, model, TOKENIZER)  # the run comes there again
    assert names(tmp_path) == {"step-00000001", "step-00000002.1"}


@pytest.mark.parametrize("name", every_file())
def test_any_flipped_bit_is_seen(saved: Path, name: str) -> None:
    content = (saved / name).read_bytes()
    for i in range(40):
        damage(saved / name, "flipped", (i + 0.5) / 40)
        assert checkpoint.verify(saved) is not None
        (saved / name).write_bytes(content)
    assert checkpoint.verify(saved) is None


def test_a_file_too_many_is_seen(saved: Path) -> None:
    (saved / ".DS_Store").write_bytes(b"")
    assert checkpoint.verify(saved) is None
    shutil.copy(saved / every_file()[-2], saved / "model" / "shard-00002.safetensors")
    assert checkpoint.verify(saved) == "SHA256SUMS lacks model/shard-00002.safetensors"


def test_generation_needs_no_optimizer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = save(tmp_path, 1, 1), save(tmp_path, 2, 2)
    damage(tmp_path / "step-00000002" / every_file()[-1], "flipped")
    assert same(load(tmp_path)[0].state_dict(), second.state_dict())
    damage(tmp_path / "step-00000002" / every_file()[-2], "flipped")
    assert not said(caplog)
    assert same(load(tmp_path)[0].state_dict(), first.state_dict())
    assert len(said(caplog)) == 1
    with pytest.raises(ValueError, match=r"^checkpoint: \S+ is damaged; model/shard\S+ does not m"):
        load(tmp_path / "step-00000002")


def test_all_damaged_is_an_error(tmp_path: Path) -> None:
    for n in (1, 2):
        save(tmp_path, n)
        damage(tmp_path / f"step-{n:08d}" / "train.json", "cut")
    with pytest.raises(ValueError, match=r"^checkpoint: \S+ must hold a whole one; all are dam"):
        Checkpointer(tmp_path, NOW).latest()
    assert len(names(tmp_path)) == 2


def test_a_run_without_a_checkpoint_has_no_latest(tmp_path: Path) -> None:
    assert Checkpointer(tmp_path, NOW).latest() is None
    assert Checkpointer(tmp_path / "nowhere", NOW).latest() is None
    assert not (tmp_path / "nowhere").exists()


# --- what is none of this library's ---------------------------------------------------------------


def change_config(at: Path, **changes: Any) -> None:
    config = json.loads((at / "config.json").read_text())
    config["model"].update(changes.pop("model", {}))
    (at / "config.json").write_text(json.dumps(config | changes))
    resum(at)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": "other"}, r'config.json must say "format": "fastgpt"'),
        ({"version": 1}, r"must have version 2; got 1"),
        ({"model": {"n_embd": 64}}, r"must hold \S+ as \("),
        ({"model": {"n_layer": 3}}, r"it must hold the model's weights; it lacks h\.2\."),
        ({"model": {"n_layer": 1}}, r"it must hold the model's weights; it has the unknown h\.1\."),
        ({"model": {"n_head": 5}}, r"n_embd must be a multiple of n_head"),
        ({"model": {"width": 5}}, r"unexpected keyword argument 'width'"),
        ({"model": {"vocab_size": 299}}, r"must hold wte.weight as \(299, 16\)"),
    ],
    ids=str,
)
def test_rejects_a_foreign_checkpoint(saved: Path, changes: dict[str, Any], message: str) -> None:
    change_config(saved, **changes)
    with pytest.raises(ValueError, match=rf"^checkpoint: [^\n]*{message}[^\n]*$"):
        load(saved)


def test_rejects_hugging_faces_checkpoint(tmp_path: Path) -> None:
    import transformers

    shape = {"n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 9, "n_positions": 4}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^checkpoint: .* was made by something else$"):
        load(tmp_path)


def test_rejects_integer_weights(saved: Path) -> None:
    file = saved / every_file()[-2]
    save_file({k: v.to(torch.int64) for k, v in load_file(file).items()}, file)
    resum(saved)
    with pytest.raises(ValueError, match=r"^checkpoint: .*got torch.int64"):
        load(saved)


def test_rejects_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^checkpoint: .*; got a folder without one$"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"^checkpoint: .*; there is no such folder$"):
        load(tmp_path / "nowhere")


def test_rejects_a_checkpoint_of_another_model(saved: Path) -> None:
    other = model_of(0, GPTConfig(block_size=8, vocab_size=257, n_layer=1, n_head=2, n_embd=16))
    before = weights(other)
    with pytest.raises(ValueError, match=r"^checkpoint: the model must have the run's shape; got"):
        Checkpointer(saved.parent, NOW).load(saved, other)
    assert same(other.state_dict(), before)


def test_rejects_an_optimizer_of_other_parameters(saved: Path, tmp_path: Path) -> None:
    saver, model = Checkpointer(tmp_path / "b", NOW), model_of()
    few = torch.optim.AdamW([model.wte.weight])
    with pytest.raises(ValueError, match=r"^checkpoint: [^\n]*must have the parameter"):
        saver.load(saved, model, few)
    foreign = torch.optim.AdamW(model_of(1).parameters())
    with pytest.raises(ValueError, match=r"^checkpoint: the optimizer's parameters must be the m"):
        saver.save(1, model, TOKENIZER, foreign)
    saver.save(1, model, TOKENIZER)
    with pytest.raises(ValueError, match=r"^checkpoint: [^\n]*has no optimizer's state"):
        saver.load(tmp_path / "b" / "step-00000001", model, few)


def test_reading_runs_no_code(saved: Path) -> None:
    """A pickle in the place of a file is refused, not run."""

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(saved.parent / "run-by-pickle"),)

    for name in every_file()[-2:]:
        torch.save(Evil(), saved / name)
    torch.save(Evil(), saved / "model" / "__0_0.distcp")
    shutil.copy(saved / "model" / "__0_0.distcp", saved / "model" / ".metadata")
    resum(saved)
    model = model_of()
    with pytest.raises(ValueError, match=r"^checkpoint: [^\n]*$"):
        load(saved)
    with pytest.raises(ValueError, match=r"^checkpoint: [^\n]*$"):
        Checkpointer(saved.parent, NOW).load(saved, model, optimizer_of(model))
    assert not (saved.parent / "run-by-pickle").exists()


# --- export ---------------------------------------------------------------------------------------


def test_an_export_is_hugging_faces_own(saved: Path, tmp_path: Path) -> None:
    import transformers

    checkpoint.export(saved.parent, tmp_path / "hf")
    ours = load(saved)[0].eval()
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    ids = torch.arange(6)[None]
    torch.testing.assert_close(theirs(ids).logits, ours(ids), rtol=1e-4, atol=1e-5)
    assert same(GPT.from_pretrained(tmp_path / "hf").state_dict(), ours.state_dict())
    again = Tokenizer.load(tmp_path / "hf" / "tokenizer.json")
    assert again.token_bytes == TOKENIZER.token_bytes


@pytest.mark.parametrize("change", [{"every": -1}, {"keep": 0}], ids=str)
def test_rejects_a_configuration(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^checkpoint: \w+ must [^\n]*; got -?\d$"):
        CheckpointConfig(**change)
