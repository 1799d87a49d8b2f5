"""Functions run by several processes with a process group, as torchrun would: ranks of a run.

They are forked from a server that has imported torch already, so that a life costs a fraction of a
second and a test can have dozens.
"""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["fastgpt.train", "torch.distributed.fsdp", "torch._dynamo"])


def start(world: int, tmp: Path, work: Callable[..., Any], *args: Any) -> list[BaseProcess]:
    """Begin work(rank, *args) in as many processes; what they raise is in tmp/rank-0.txt, ..."""
    meeting = tmp / f"meeting.{time.monotonic_ns()}"
    ranks: list[BaseProcess] = [
        _context.Process(target=_rank, args=(rank, world, meeting, tmp, work, args))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    return ranks


def run(world: int, tmp: Path, work: Callable[..., Any], *args: Any) -> None:
    """work(rank, *args) in as many processes, to the end of all; it must not raise in any."""
    ranks = start(world, tmp, work, *args)
    for process in ranks:
        process.join(120)
        process.kill()
    said = [(tmp / f"rank-{rank}.txt").read_text() for rank in range(world)]
    assert not any(p.exitcode for p in ranks), "\n".join(said)


def _rank(
    rank: int, world: int, meeting: Path, tmp: Path, work: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(1)
    (tmp / f"rank-{rank}.txt").write_text("")
    try:
        if world > 1:
            dist.init_process_group(
                "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world
            )
        work(rank, *args)
        if world > 1:
            dist.destroy_process_group()
    except BaseException as error:
        (tmp / f"rank-{rank}.txt").write_text(
            f"{type(error).__name__}: {error}\n\n{traceback.format_exc()}"
        )
        os._exit(1)
