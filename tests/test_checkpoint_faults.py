"""What goes wrong with disks and ranks while a checkpoint is written."""

import itertools
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastgpt.train import checkpoint, load
from fastgpt.train.checkpoint import CheckpointConfig, Checkpointer, folder
from tests import ranks
from tests.test_checkpoint_ranks import TOKENIZER, everything, here, trained

resource = pytest.importorskip("resource")


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Within, this process's files can have no more bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 500 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("may not mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_leaves_the_last_one(small_disk: Path, asynchronous: bool) -> None:
    model, optimizer = trained("plain", 0)
    saver = Checkpointer(small_disk, CheckpointConfig(asynchronous=asynchronous))
    saver.save(1, model, TOKENIZER, optimizer)
    saver.wait()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    there = sorted(os.walk(small_disk))
    (small_disk / "other").write_bytes(bytes(shutil.disk_usage(small_disk).free - 50_000))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    for _ in range(2):  # each attempt tells of itself
        with pytest.raises(OSError, match=r"^checkpoint: step 2 is not saved; No space left on d"):
            saver.save(2, model, TOKENIZER, optimizer)
            saver.wait()
    (small_disk / "other").unlink()
    assert sorted(os.walk(small_disk)) == there
    again, _ = load(small_disk)
    assert all(torch.equal(v, before[k]) for k, v in again.state_dict().items())
    saver.wait()


def full_on_the_second(rank: int, out: Path) -> None:
    model, optimizer = trained("fsdp", 0)
    saver = Checkpointer(out, CheckpointConfig(), here())
    saver.save(1, model, TOKENIZER, optimizer)
    saver.wait()
    with files_of_at_most(10_000 if rank else 2**40):
        saver.save(2, model, TOKENIZER, optimizer)
        with pytest.raises(OSError) as raised:
            saver.save(3, model, TOKENIZER, optimizer)  # tells of the one before
    assert str(raised.value) == "checkpoint: step 2 is not saved; rank 1: File too large"
    dist.barrier()
    assert [p.name for p in out.iterdir()] == ["step-00000001"]
    saver.save(3, model, TOKENIZER, optimizer)
    saver.wait()
    assert saver.latest() == out / "step-00000003"


def test_a_full_disk_of_one_rank_is_known_to_all(tmp_path: Path) -> None:
    ranks.run(2, tmp_path, full_on_the_second, tmp_path / "run")


def full_on_the_first(rank: int, out: Path) -> None:
    """The small files that rank 0 writes in the end do not fit."""
    model, optimizer = trained("ddp", 0)
    saver = Checkpointer(out, CheckpointConfig(asynchronous=False), here())
    out.mkdir(exist_ok=True)
    begin = folder.begin

    def begin_and_fill(*args: Any) -> Path:
        part = begin(*args)
        (part / "tokenizer.json").mkdir()  # cannot be written
        return part

    setattr(folder, "begin", begin_and_fill)  # noqa: B010
    with pytest.raises(OSError, match=r"^checkpoint: step 1 is not saved; rank 0: [^\n]*"):
        saver.save(1, model, TOKENIZER, optimizer)
    dist.barrier()
    assert not list(out.iterdir())


def test_what_fails_on_the_first_rank_fails_on_all(tmp_path: Path) -> None:
    ranks.run(2, tmp_path, full_on_the_first, tmp_path / "run")


def in_folders_of_their_own(rank: int, out: Path) -> None:
    model, optimizer = trained("fsdp", 0)
    saver = Checkpointer(out / str(rank), CheckpointConfig(asynchronous=False), here())
    with pytest.raises(OSError, match=r"^checkpoint: step 1 [^\n]*must be shared by all ranks"):
        saver.save(1, model, TOKENIZER, optimizer)


def test_a_folder_that_is_not_shared_is_refused(tmp_path: Path) -> None:
    ranks.run(2, tmp_path, in_folders_of_their_own, tmp_path / "run")
    assert not list((tmp_path / "run").glob("*/step-*"))


def two_checkpoints(rank: int, out: Path) -> None:
    saver = Checkpointer(out, CheckpointConfig(), here())
    for step in (1, 2):
        model, optimizer = trained("fsdp", step)
        saver.save(step, model, TOKENIZER, optimizer)
    saver.wait()


def fall_back(rank: int, out: Path) -> None:
    heard: list[str] = []
    from fastgpt.train.checkpoint import checkpointer

    handler = logging.Handler()
    setattr(handler, "emit", lambda record: heard.append(record.getMessage()))  # noqa: B010
    checkpointer.logger.addHandler(handler)
    saver = Checkpointer(out, CheckpointConfig(), here())
    assert saver.latest() == out / "step-00000001"
    assert len(heard) == (1 if rank == 0 else 0)  # one line, from rank 0 only
    model, optimizer = trained("fsdp", 9)
    saver.load(out / "step-00000001", model, optimizer)
    want = everything(*trained("fsdp", 1))
    got = everything(model, optimizer)
    assert all(torch.equal(got[k], want[k]) for k in want)
    with pytest.raises(ValueError, match=r"^checkpoint: \S+ is damaged; [^\n]*$"):
        saver.load(out / "step-00000002", model, optimizer)


@pytest.mark.parametrize("file", ["model/shard-00002*", "optimizer/shard-00001*", "train.json"])
def test_all_ranks_fall_back_together(tmp_path: Path, file: str) -> None:
    out = tmp_path / "run"
    ranks.run(2, tmp_path, two_checkpoints, out)
    (spoilt,) = (out / "step-00000002").glob(file)
    content = bytearray(spoilt.read_bytes())
    content[len(content) // 2] ^= 1
    spoilt.write_bytes(content)
    ranks.run(2, tmp_path, fall_back, out)


def killed_in_a_save(rank: int, out: Path, victim: int, when: str) -> None:
    """A rank is killed at one place of a save; the others end with one line, at once."""
    model, optimizer = trained("fsdp", 0)
    saver = Checkpointer(out, CheckpointConfig(), here())
    saver.save(1, model, TOKENIZER, optimizer)
    saver.wait()

    def die(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == victim:
        from fastgpt.train.checkpoint import tensors

        where = {"begin": folder, "write": tensors, "sha256": folder, "commit": folder}
        setattr(where[when], when, die)
    start = time.monotonic()
    saver.save(2, model, TOKENIZER, optimizer)
    with pytest.raises(ConnectionError) as raised:
        saver.wait()
    assert str(raised.value) == "checkpoint: step 2 is not saved; another rank has gone"
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    "victim, when",
    [(0, "begin"), (0, "write"), (1, "write"), (1, "sha256"), (0, "commit")],
    ids=str,
)
def test_a_rank_that_dies_in_a_save_ends_it(tmp_path: Path, victim: int, when: str) -> None:
    out = tmp_path / "run"
    processes = ranks.start(2, tmp_path, killed_in_a_save, out, victim, when)
    for process in processes:
        process.join(90)
    assert processes[victim].exitcode == -signal.SIGKILL
    assert (tmp_path / f"rank-{1 - victim}.txt").read_text() == ""
    assert checkpoint.checkpoints(out) == [out / "step-00000001"]
    assert checkpoint.verify(out / "step-00000001") is None
    ranks.run(2, tmp_path, saves_again, out)
    assert {p.name for p in out.iterdir()} == {"step-00000001", "step-00000002"}


def saves_again(rank: int, out: Path) -> None:
    model, optimizer = trained("fsdp", 0)
    saver = Checkpointer(out, CheckpointConfig(), here())
    at = saver.latest()
    assert at is not None
    saver.load(at, model, optimizer)
    saver.save(2, model, TOKENIZER, optimizer)
    saver.wait()


CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


def die_before(n: int, out: Path) -> None:
    """Have this process killed as it is about to make its n-th change in a folder."""
    changes = itertools.count(1)

    def change(event: str, args: Any) -> None:
        if event in CHANGES and str(args[0]).startswith(str(out)) and next(changes) == n:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(change)


def test_a_kill_before_any_change_of_the_disk_leaves_a_whole_one(tmp_path: Path) -> None:
    """Each of them in turn: the second of two saves, the first of which it removes."""
    model, optimizer = trained("plain", 0)
    for n in itertools.count(1):
        out = tmp_path / str(n)
        saver = Checkpointer(out, CheckpointConfig(keep=1, asynchronous=False))
        saver.save(1, model, TOKENIZER, optimizer)
        child = os.fork()
        if child == 0:
            die_before(n, out)
            saver.save(2, model, TOKENIZER, optimizer)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        found = checkpoint.checkpoints(out)
        assert found, f"none after {n} changes"
        for at in found:
            assert checkpoint.verify(at) is None, f"{at.name} is torn after {n} changes"
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert n > 20
    assert found == [out / "step-00000002"]
