"""Tiles measured by `fastgpt tune`, the cache they are kept in, and `warmup`."""

import importlib
import inspect
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastgpt
from fastgpt import GPTConfig
from fastgpt.cli import main
from fastgpt.kernels import tiles, tuned
from fastgpt.kernels.tiles import AttentionTiles, ProductTile, Tile, layer_norm_tile
from fastgpt.ops import backend, tuning
from fastgpt.ops.backend import INTERPRET
from tests.conftest import HAS_CUDA, SANITIZED

module = importlib.import_module("fastgpt.tune")  # fastgpt.tune is the function
TILE = Tile(2, 64, 2, 1)
GPU = "A GPU"


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    with tuned.measured({}):
        yield


def cache(path: Path, **other: str) -> Path:
    """A file with one measured tile of layer norm."""
    row = {
        "function": "layer_norm_tile", "key": "N=40, backward=False, dropout=False",
        "tile": tuning.encode(TILE), "seconds": 1.0, "default_seconds": 2.0,
    }  # fmt: skip
    one = tuning.versions(GPU) | other | {"tiles": [row]}
    path.write_text(json.dumps({"fastgpt tiles": 1, "sets": [one]}))
    return path


# ------------------------------------------------------------------ the hook


def test_every_choice_of_tiles_can_be_tuned() -> None:
    chosen = [f for name, f in vars(tiles).items() if name.endswith(("_tile", "_tiles"))]
    assert len(chosen) >= 5
    for f in chosen:
        assert hasattr(f, "__wrapped__"), f"{f.__name__} needs @tunable"
        assert inspect.signature(f).return_annotation is not inspect.Signature.empty


def test_a_measured_tile_takes_the_place_of_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "chip", lambda: "sm_90")
    table = layer_norm_tile(768)
    tuned.use_measured({("layer_norm_tile", "N=768, backward=False, dropout=False"): TILE})
    assert layer_norm_tile(768) == layer_norm_tile(N=768, backward=False) == TILE
    assert layer_norm_tile(768, True) != TILE and layer_norm_tile(769) != TILE
    with tuned.measured({}):
        assert layer_norm_tile(768) == table


def test_rows_say_what_speaks_for_them() -> None:
    assert TILE.basis == "compiled, Triton 3.7.1"
    assert (
        ProductTile(1, 2, 3, 4, 5).block_k == 5 and ProductTile(1, 2, 3, 4, 5).basis == TILE.basis
    )
    assert replace(TILE, basis="measured") == TILE  # it does not make another tile of it


@pytest.mark.skipif(INTERPRET, reason="compiles")
def test_offline_compilation_knows_no_measured_tiles() -> None:
    from fastgpt.lab.compile import present

    key = ("layer_norm_tile", "N=768, backward=False, dropout=False")
    with tuned.measured({key: TILE}), present("sm_90"):
        assert layer_norm_tile(768) != TILE


# ------------------------------------------------------------------ the cache


@pytest.mark.parametrize(
    "tile", [TILE, ProductTile(16, 32, 4, 2, 64), AttentionTiles(TILE, TILE, TILE)], ids=str
)
def test_a_tile_goes_through_json(tile: Any) -> None:
    assert tuning.decode(json.loads(json.dumps(tuning.encode(tile)))) == tile


def test_only_the_set_of_this_gpu_triton_and_fastgpt_counts(tmp_path: Path) -> None:
    sets = tuning.read(cache(tmp_path / "a"))
    key = ("layer_norm_tile", "N=40, backward=False, dropout=False")
    assert tuning.measured_for(sets, GPU) == {key: TILE}
    assert tuning.measured_for(sets, "another") == {}
    for name in ("triton", "fastgpt"):
        other = tuning.read(cache(tmp_path / "b", **{name: "0"}))
        assert tuning.measured_for(other, GPU) == {}
    assert tuning.read(tmp_path / "missing") == []


BROKEN = {
    "cut off": '{"fastgpt tiles": 1, "se',
    "not a file of fastgpt's tiles": '{"tiles": []}',
    "format 1": '{"fastgpt tiles": 99}',
    "'sets' is missing": '{"fastgpt tiles": 1}',
    "num_warps must be a positive number": None,
}


@pytest.mark.parametrize("why", BROKEN)
def test_a_broken_file_is_ignored_with_one_warning_that_names_it(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: GPU)
    path = cache(tmp_path / "tiles.json")
    path.write_text(BROKEN[why] or path.read_text().replace('"num_warps": 2', '"num_warps": -2'))
    with pytest.warns(UserWarning, match="tiles.json cannot be used") as caught:
        tuning.load(path)
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    assert why == "cut off" or why in str(caught[0].message)
    assert not tuned._measured


def test_tiles_of_an_unknown_kind_or_with_other_fields_are_refused() -> None:
    for said, rule in [
        ({"type": "Popen", "args": 1}, "no tile of type 'Popen'"),
        ({"type": "Tile", "block_m": 1}, "Tile has other fields"),
        (tuning.encode(TILE) | {"block_q": 1}, "Tile has other fields"),
        (tuning.encode(TILE) | {"block_m": True}, "block_m must be a positive number; got True"),
        ([], r"must be an object; got \[\]"),
    ]:
        with pytest.raises(ValueError, match=rule):
            tuning.decode(said)  # type: ignore[arg-type]


def test_the_cache_is_looked_for_once_and_only_where_a_gpu_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "TILES", cache(tmp_path / "tiles.json"))
    monkeypatch.setattr(backend, "_looked", False)
    monkeypatch.setattr(backend, "INTERPRET", False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: GPU)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    backend.look_for_measured_tiles()
    assert not tuned._measured and not backend._looked
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with backend.rehearsal():  # as the lab does
        backend.look_for_measured_tiles()
    assert not tuned._measured
    backend.look_for_measured_tiles()
    assert len(tuned._measured) == 1
    tuned.use_measured({})
    backend.look_for_measured_tiles()
    assert not tuned._measured


def test_the_environment_says_where_the_cache_is() -> None:
    for env, want in [
        ({}, "~/.cache/fastgpt/tiles.json"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/fastgpt/tiles.json"),
        ({"XDG_CACHE_HOME": "/x", "FASTGPT_CACHE": "/y/t.json"}, "/y/t.json"),
    ]:
        assert backend._cache(env) == Path(want)


# ------------------------------------------------------------------ the sweep


def test_candidates_are_near_the_table_first_and_all_different() -> None:
    near = list(module.near(ProductTile(16, 32, 4, 1, 64)))
    changed = [
        sum(getattr(t, n) != v for n, v in vars(ProductTile(16, 32, 4, 1, 64)).items())
        for t in near
    ]
    assert changed == sorted(changed) and changed[0] == 1
    assert len(set(near)) == len(near) == 3**4 * 2 - 1
    assert all(t.num_stages >= 1 and t.num_warps in (2, 4, 8) for t in near)


class Event:
    """The stand-in's GPU has no events: the host's clock."""

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: "Event") -> float:
        return 1e3 * (other.at - self.at)


@pytest.mark.gpu
def test_tune_times_writes_and_uses(
    device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if SANITIZED:
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
        monkeypatch.setattr(module, "FLUSHED", 64)
    path = tmp_path / "deep" / "tiles.json"
    argv = ["tune", "rms_norm:M=3,N=20", "--device", device, "--rounds", "1", "--candidates", "1"]
    assert main([*argv, "--dtype", "float32", "--cache", str(path)]) == 0
    out = capsys.readouterr().out
    assert (
        "layer_norm_tile(N=20, backward=True, dropout=False)" in out
        and "2 timed, 0 rejected" in out
    )
    fastgpt.tune(["adamw:N=40"], dtype=torch.float32, device=device, rounds=1, candidates=1,
                 path=path, say=len)  # fmt: skip
    (one,) = tuning.read(path)
    gpu = "cpu, Triton's interpreter" if INTERPRET else torch.cuda.get_device_name()
    assert one["gpu"] == gpu
    assert [row["function"] for row in one["tiles"]] == ["adamw_tile"] * 2 + ["layer_norm_tile"] * 2
    assert all(row["tile"]["basis"].startswith(f"measured on {gpu}") for row in one["tiles"])
    assert os.listdir(path.parent) == ["tiles.json"]
    assert len(tuned._measured) == (0 if INTERPRET else 4)  # used from now on, on a GPU


@pytest.mark.gpu
def test_a_candidate_that_fails_or_is_wrong_is_rejected(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastgpt.tune_ops import TASKS

    task = TASKS["rms_norm"]

    def call(**inputs: Any) -> Any:
        warps = next(iter(tuned._measured.values()), TILE).num_warps
        if warps == 8:
            raise RuntimeError("out of\nresources")
        return task.call(**inputs) * (1.1 if warps == 16 else 1.0)

    monkeypatch.setattr(module, "near", lambda t: (replace(t, num_warps=n) for n in (4, 8, 16)))
    monkeypatch.setattr(module, "_seconds", lambda step, flush: float(step() is None) + 1.0)
    found = next(
        module._tune_op(
            "x", replace(task, call=call), {"M": 3, "N": 20}, torch.float32, device, 1, 3
        )
    )
    failed, wrong = found.rejected
    assert found.timed == 2 and "num_warps=8" in failed and "num_warps=16" in wrong
    assert failed.endswith("RuntimeError: out of resources")
    assert "wrong: the value is off by" in wrong


@pytest.mark.gpu
def test_the_fastest_is_taken_if_it_wins_by_more_than_noise(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(step: Any, flush: Any) -> float:
        step()
        tile = next(iter(tuned._measured.values()))
        return {1: 1.0, 2: 0.99, 4: 0.5}.get(tile.num_warps, 1.0)

    from fastgpt.tune_ops import TASKS

    monkeypatch.setattr(module, "_seconds", seconds)
    for warps, winner in ((2, None), (4, 4)):
        monkeypatch.setattr(module, "near", lambda t, n=warps: [replace(t, num_warps=n)])
        start = layer_norm_tile(20)
        found = next(
            module._tune_op("x", TASKS["rms_norm"], {"M": 3, "N": 20}, torch.float32, device, 1, 3)
        )
        assert found.tile.num_warps == (winner or start.num_warps)


NO_GPU = pytest.mark.skipif(HAS_CUDA or INTERPRET, reason="about a machine without a GPU")


@NO_GPU
def test_without_a_gpu_it_says_so_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("tune: needs a GPU; got none") and err.count("\n") == 1
    assert main(["tune", "--device", "cpu"]) == 2
    assert "TRITON_INTERPRET must be 1" in capsys.readouterr().err


def test_rejects(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(backend, "INTERPRET", True)
    calls: list[tuple[list[str], dict[str, Any], str]] = [
        (["convolution"], {}, "the op must be one of attention, .*; got 'convolution'"),
        (["adamw:M=2"], {}, "adamw takes N, as NAME=NUMBER of at least 1; got 'M=2'"),
        (["adamw:N=0"], {}, "adamw takes N, .*; got 'N=0'"),
        (["adamw"], {"rounds": 0}, "rounds must be at least 1; got 0"),
        (["adamw"], {"device": "tpu"}, "the device must be cuda or cpu; got 'tpu'"),
    ]
    for args, kwargs, rule in calls:
        with pytest.raises(ValueError, match=f"tune: {rule}"):
            fastgpt.tune(args, **{"device": "cpu"} | kwargs)
    broken = tmp_path / "tiles.json"
    broken.write_text("[]")
    with pytest.raises(ValueError, match="cannot be used"):
        fastgpt.tune(["adamw"], device="cpu", path=broken)


# ------------------------------------------------------------------ warmup

CONFIG = GPTConfig(block_size=32, vocab_size=64, n_layer=1, n_head=1, n_embd=64)


@NO_GPU
def test_warmup_needs_a_gpu_or_a_target() -> None:
    with pytest.raises(ValueError, match="warmup: needs a GPU, or the target to compile for"):
        fastgpt.warmup(CONFIG, 2)
    with pytest.raises(ValueError, match=r"block_size 32; got batch_size 2, T 33"):
        fastgpt.warmup(CONFIG, 2, 33, target="sm_90")
    with pytest.raises(ValueError, match="got 'sm_42'"):
        fastgpt.warmup(CONFIG, 2, target="sm_42")


@pytest.mark.compile
@NO_GPU
def test_what_a_step_launches_was_compiled_by_warmup() -> None:
    from fastgpt.lab.compile import offline
    from fastgpt.model import GPT

    names = fastgpt.warmup(CONFIG, 2, dtype=torch.bfloat16, generation=True, target="sm_90")
    assert {"attention._fwd_kernel", "layer_norm._bwd_kernel", "ffn._up_kernel"} <= set(names)
    model = GPT(CONFIG).bfloat16()
    ids = torch.zeros(2, 32, dtype=torch.int64)
    with offline("sm_90") as kernels, backend.rehearsal(), fastgpt.use("triton"):
        before = compiled(names)
        model(ids, ids).backward()
        with warnings.catch_warnings(), torch.no_grad():
            model.hidden(ids[:, :9], model.new_cache(2))
    assert {k.name for k in kernels} <= set(names)
    assert compiled(names) == before


def compiled(names: list[str]) -> dict[str, int]:
    """How many binaries each kernel has for the chip."""
    made = {}
    for name in names:
        file, _, function = name.partition(".")
        kernel = getattr(sys.modules[f"fastgpt.kernels.{file}"], function)
        made[name] = len(kernel.device_caches["sm_90"][0])
    return made
