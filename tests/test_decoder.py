"""What a Decoder gives, whatever was done before, are the logits of each row's tokens alone."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastgpt
from fastgpt.cache import KVCache, rolling_room
from fastgpt.decoder import Decoder
from fastgpt.model import GPT, GPTConfig
from fastgpt.ops.library import implementations
from tests.conftest import SANITIZED, launched
from tests.test_pretrained_gpt2 import GREEDY, microformer  # noqa: F401

V, LENGTH, WINDOW = 61, 160, 9
SHAPE = GPTConfig(block_size=LENGTH, vocab_size=V, n_layer=2, n_head=4, n_embd=32)
LLAMA: dict[str, Any] = {"variant": "llama", "n_kv_head": 2, "n_inner": 48}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2, window": {"window": WINDOW},
    "llama": LLAMA,
    "llama, window, qk_norm": {**LLAMA, "qk_norm": True, "window": WINDOW, "tied": False},
}


def model_of(shape: str = "gpt2", **changes: Any) -> GPT:
    torch.manual_seed(0)
    given = {"bias": None, "activation": None, **SHAPES[shape], **changes}
    model = GPT(replace(SHAPE, **given)).eval()
    for name, p in model.named_parameters():
        nn.init.normal_(p, mean=1.0 if name.endswith("weight") and p.ndim == 1 else 0.0, std=0.2)
    return model


def tokens(B: int, T: int, seed: int = 7) -> Tensor:
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


class Rows:
    """A Decoder beside the tokens of its rows; every answer is compared with the whole forward."""

    def __init__(self, model: GPT, B: int, **options: Any) -> None:
        self.model, self.decoder = model, Decoder(model, B, **options)
        self.rows: list[list[int]] = [[] for _ in range(B)]
        self.slides = options.get("full") == "slide"
        self.seed = 0

    def new(self, T: int) -> Tensor:
        self.seed += 1
        return tokens(len(self.rows), T, self.seed).to(self.model.wte.weight.device)

    def add(self, ids: Tensor, counts: list[int]) -> None:
        length = self.decoder.length
        for b, n in enumerate(counts):
            if len(self.rows[b]) + n > length:  # the rule as its docstring has it
                keep = max(0, min(length // 2, length - n))
                self.rows[b] = self.rows[b][len(self.rows[b]) - keep :]
            self.rows[b] = (self.rows[b] + ids[b, :n].tolist())[-length:]

    @torch.no_grad()
    def check(self, logits: Tensor, last: int = 1) -> None:
        """The logits after the last tokens of each row: (B, V) or (B, last, V)."""
        assert self.decoder.lengths == [len(row) for row in self.rows]
        for b, row in enumerate(self.rows):
            ids = torch.tensor([row], device=logits.device)
            with fastgpt.use("reference"):
                want = self.model(ids)[0, -last:]
            close(logits[b].view(last, V), want)

    def prefill(self, T: int, lengths: list[int] | None = None) -> None:
        ids = self.new(T)
        logits = self.decoder.prefill(ids, lengths)
        self.add(ids, lengths or [T] * len(self.rows))
        self.check(logits)

    def step(self) -> None:
        ids = self.new(1)
        logits = self.decoder.step(ids[:, 0])
        self.add(ids, [1] * len(self.rows))
        self.check(logits)

    def extend(self, T: int) -> None:
        ids = self.new(T)
        logits = self.decoder.extend(ids)
        self.add(ids, [T] * len(self.rows))
        self.check(logits, T)

    def truncate(self, lengths: list[int]) -> None:
        self.decoder.truncate(lengths)
        self.rows = [row[:n] for row, n in zip(self.rows, lengths, strict=True)]

    def reorder(self, rows: list[int]) -> None:
        self.decoder.reorder(torch.tensor(rows))
        self.rows = [list(self.rows[row]) for row in rows]


@pytest.fixture(params=["one token", "modules"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a step is made."""
    if request.param == "modules":
        monkeypatch.setattr("fastgpt.decoder.one_token", lambda *_: None)
    way: str = request.param
    return way


@pytest.mark.parametrize("room", [None, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_way_to_add_tokens_gives_the_logits_of_the_whole(
    shape: str, room: int | None, by: str
) -> None:
    rows = Rows(model_of(shape), 3, room=room)
    rows.prefill(7)
    for _ in range(4):  # of one length
        rows.step()
    rows.extend(3)
    rows.truncate([12, 9, 14])
    rows.step()
    rows.step()
    rows.extend(5)
    rows.prefill(8, [8, 1, 4])
    rows.reorder([2, 2, 0])
    rows.step()
    rows.reorder([1])
    rows.step()
    rows.reorder([0, 0])
    rows.step()


@pytest.mark.parametrize("shape", ["gpt2, window", "llama, window, qk_norm"])
def test_a_room_goes_round(shape: str, by: str) -> None:
    rows = Rows(model_of(shape), 2)
    slots = rows.decoder.cache.slots
    assert slots == rolling_room(WINDOW) == 128 < LENGTH
    rows.prefill(60, [60, 3])
    rows.prefill(62)
    for _ in range(9):  # 131 and 74
        rows.step()
    rows.truncate([100, 70])
    rows.extend(9)
    rows.truncate([0, 70])
    rows.prefill(70, [70, 6])
    rows.reorder([1, 0])
    rows.step()
    with pytest.raises(ValueError, match=r"a row that rolls can be truncated to 0 or .* got 11$"):
        again = Rows(rows.model, 1)
        again.prefill(150)
        again.step()
        again.truncate([11])


def test_a_long_prompt_in_a_rolling_room(by: str) -> None:
    rows = Rows(model_of("gpt2, window"), 2)
    rows.prefill(150, [150, 140])
    rows.step()
    rows.reorder([0, 0])
    rows.step()


@pytest.mark.parametrize("length", [13, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_full_row_slides(shape: str, length: int, by: str) -> None:
    rows = Rows(model_of(shape), 2, length=length, full="slide", room=4)
    rows.prefill(9, [9, 4])
    for _ in range(2 * length):
        rows.step()
    rows.extend(5)
    rows.prefill(40, [2, 40])
    rows.prefill(length - 1)
    rows.step()
    rows.extend(3)


@given(data=st.data())
@settings(max_examples=25)
def test_whatever_is_done_in_whatever_order(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from(list(SHAPES)))
    slides = data.draw(st.booleans())
    length, B = data.draw(st.sampled_from([12, 30])), data.draw(st.integers(1, 3))
    room = data.draw(st.sampled_from([None, 1, 8]))
    rows = Rows(model_of(shape), B, length=length, room=room, full="slide" if slides else "refuse")
    for _ in range(data.draw(st.integers(2, 6))):
        held = rows.decoder.lengths
        left = length if slides else length - max(held)
        what = data.draw(st.sampled_from(["prefill", "step", "extend", "truncate", "reorder"]))
        if what in ("prefill", "step", "extend") and not left:
            what = "truncate"
        if what == "prefill":
            T = data.draw(st.integers(1, min(left, 9)))
            rows.prefill(T, [data.draw(st.integers(1, T)) for _ in held])
        elif what == "step":
            rows.step()
        elif what == "extend":
            rows.extend(data.draw(st.integers(1, min(left, 4))))
        elif what == "truncate":
            rows.truncate([data.draw(st.integers(0, n)) for n in held])
        else:
            wanted = st.lists(st.integers(0, len(held) - 1), min_size=1, max_size=3)
            rows.reorder(data.draw(wanted))


def test_a_room_grows_by_doubling_and_not_at_every_step() -> None:
    decoder = Decoder(model_of(), 2, 100, room=8)
    rooms, sizes = {decoder.cache.room(0)}, [decoder.cache.slots]
    for token in tokens(100, 2):
        decoder.step(token)
        rooms.add(decoder.cache.room(0))
        sizes.append(decoder.cache.slots)
    assert sorted(set(sizes)) == [8, 16, 32, 64, 100] and len(rooms) == 5


def test_what_a_cache_takes() -> None:
    model = model_of("llama, window, qk_norm").bfloat16()
    layers, B, heads, D = 2, 3, 2, 8
    got = Decoder(model, B)
    assert got.cache.nbytes == 2 * layers * B * rolling_room(WINDOW) * heads * D * 2
    assert got.cache.room(0).dtype == torch.bfloat16
    assert Decoder(model, B, 50).cache.nbytes == 2 * layers * B * 50 * heads * D * 2


def test_rows_do_not_see_what_pads_others() -> None:
    """Nor what was there before: NaN in a padded row's room would spread."""
    model, ids = model_of(), tokens(2, 6)
    want = Decoder(model, 1).prefill(ids[:1, :2])
    for seed in range(2):
        other = torch.cat((ids[:1, :2], tokens(1, 4, seed)), 1)
        decoder = Decoder(model, 2)
        close(decoder.prefill(torch.cat((other, ids[1:])), [2, 6])[:1], want)


def test_logits_are_tensors_like_any_other_and_the_mode_is_left() -> None:
    model = model_of(dropout=0.5).train()
    decoder = Decoder(model, 1)
    for logits in (decoder.prefill(tokens(1, 3)), decoder.step(tokens(1, 1)[0])):
        assert not logits.is_inference()
        logits.mul_(2.0)
    assert model.training
    close(decoder.extend(tokens(1, 1))[:, -1] * 0, torch.zeros(1, V))
    want = model.eval()(torch.cat((tokens(1, 3), tokens(1, 1), tokens(1, 1)), 1))[:, -1]
    decoder.truncate([4])
    close(decoder.step(tokens(1, 1)[0]), want)


def test_bfloat16_rows_of_different_lengths_err_as_alone() -> None:
    model = model_of("llama").bfloat16()
    wide, ids, counts = model_of("llama").double(), tokens(3, 12), [12, 5, 1]
    for p, q in zip(wide.parameters(), model.parameters(), strict=True):
        p.data.copy_(q)
    decoder = Decoder(model, 3)
    decoder.prefill(ids, counts)
    new = tokens(3, 4, 3)
    got = torch.stack([decoder.step(token) for token in new.t()], 1)
    for b, n in enumerate(counts):
        row = torch.cat((ids[b, :n], new[b]))[None]
        with torch.no_grad():
            gold, theirs = wide(row)[0, -4:], model(row)[0, -4:]
        off, allowed = ((t.double() - gold).abs().max() for t in (got[b], theirs))
        assert off <= 2 * allowed + 1e-2


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: Decoder(m, 0), r"^Decoder: B must be at least 1; got 0$"),
        (lambda m: Decoder(m, 1, 161), r"^Decoder: length must be from 1 to block_size, 160; got"),
        (lambda m: Decoder(m, 1, room=0), r"^Decoder: room must be at least 1; got 0$"),
        (lambda m: Decoder(m, 1, full="no"), r"^Decoder: full must be one of refuse, slide; got"),
        (lambda m: Decoder(m, 1, 8).prefill(tokens(1, 9)), r"room for 8 positions a row; got 9"),
        (lambda m: Decoder(m, 2).prefill(tokens(1, 9)), r"ids must be \(B, T\), B 2 .* \(1, 9\)"),
        (lambda m: Decoder(m, 2).prefill(tokens(2, 4), [4]), r"lengths must be one a row, 2,"),
        (lambda m: Decoder(m, 1).prefill(tokens(1, 4), [5]), r"from 1 to T, 4; got \[5\]"),
        (lambda m: Decoder(m, 1).truncate([1]), r"truncated to what it holds, 0; got 1$"),
        (lambda m: Decoder(m, 1).reorder(torch.tensor([1])), r"rows must be from 0 to 0; got \[1"),
        (lambda m: Decoder(m, 1).step(torch.tensor([V])), r"ids must lie in the vocabulary"),
        (lambda m: KVCache(1, 2, 4, 1, 8).reserve(5), r"^KVCache: room is for 4 positions a row"),
    ],
)
def test_bad_input_is_said_in_one_line(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call(model_of())
    assert "\n" not in str(error.value)


def test_a_step_that_is_refused_changes_nothing() -> None:
    rows = Rows(model_of(), 2, length=6)
    rows.prefill(5)
    with pytest.raises(ValueError, match="vocabulary"):
        rows.decoder.step(torch.tensor([3, -1]))
    rows.step()
    with pytest.raises(ValueError, match='full="slide"'):
        rows.decoder.step(torch.tensor([3, 1]))
    rows.truncate([5, 6])
    assert rows.decoder.lengths == [5, 6]


@torch.no_grad()
def test_real_weights_give_hugging_faces_logits_and_ids(microformer: Path) -> None:  # noqa: F811
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(microformer)
    decoder = Decoder(GPT.from_pretrained(microformer), 2)
    prompt = torch.tensor([GREEDY[:5], [2, 0, 0, 0, 0]])
    logits = decoder.prefill(prompt, [5, 1])
    rows = [GREEDY[:5], GREEDY[:1]]
    for _ in range(20):
        token = logits.argmax(-1)
        for row, new, got in zip(rows, token.tolist(), logits, strict=True):
            want = theirs(torch.tensor([row])).logits[0, -1]
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
            row.append(new)
        logits = decoder.step(token)
    assert rows == [GREEDY[:25], GREEDY[:21]]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["gpt2", "llama, window, qk_norm"])
def test_kernels_give_the_logits_of_the_whole(
    shape: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("fastgpt.cache.PAGE", "fastgpt.cache.SPARE", "fastgpt.decoder.SPARE"):
        monkeypatch.setattr(name, 16)
    model = model_of(shape, n_layer=1, n_head=2, n_embd=16, n_kv_head=1).to(device)
    with fastgpt.use("triton"):
        rows = Rows(model, 2, graphs=False, room=4)
        rows.prefill(6, [6, 2])
        rows.step()
        rows.extend(2)
        rows.truncate([8, 5])
        rows.reorder([1, 0])
        rows.step()
        if model.config.window is not None:
            rows.prefill(28, [28, 20])
            assert max(rows.decoder.lengths) > rows.decoder.cache.slots
            rows.extend(2)
            rows.step()


class Ops(TorchDispatchMode):
    """Counts products, also those of fastgpt's ops, and what else is called beside these ops."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.others, self.inside = 0, Counter[str](), False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name, kwargs or {}
        if name.startswith("fastgpt::"):
            self.inside = True
            with self:
                made = implementations[name.partition("::")[2]](*args, **kwargs)
            self.inside = False
            return made
        if name in ("aten::mm", "aten::addmm", "aten::linear"):
            self.products += 1
        elif not self.inside:
            self.others[name] += 1
        return func(*args, **kwargs)


@pytest.mark.gpu
@pytest.mark.parametrize("shape, most", [("gpt2", 9), ("llama", 11)])
def test_how_many_launches_a_layer_of_a_step_takes(shape: str, most: int, device: str) -> None:
    """Two norms, four products, an activation, attention in two parts; llama turns q and k, and
    has a gate. In 16 bits ffn's first products and its activation are one launch: 8 and 9."""
    counts = []
    for layers in (1, 2):
        model = model_of(shape, n_layer=layers).to(device)
        decoder = Decoder(model, 1, graphs=False)
        decoder.prefill(tokens(1, 3).to(device))
        kernels = launched.total()
        with Ops() as ops:
            decoder.step(tokens(1, 1)[0].to(device))
        counts.append((launched.total() - kernels, ops.products, ops.others))
    (k1, p1, o1), (k2, p2, o2) = counts
    names = ("view", "reshape", "unflatten", "split_with_sizes", "unbind")
    views = {f"aten::{name}" for name in names}
    assert 0 < p2 - p1 and k2 - k1 + p2 - p1 <= most and set(o2 - o1) <= views


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or SANITIZED, reason="needs CUDA graphs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_graph_serves_all_positions(shape: str, dtype: torch.dtype, device: str) -> None:
    model = model_of(shape, n_embd=64).to(device, dtype)
    ids = tokens(3, LENGTH).to(device)
    pair = [Decoder(model, 3, graphs=graphs, room=24) for graphs in (True, False)]
    captured = pair[0]
    rolls = captured.cache.rolls
    graphs: set[object] = set()  # kept, so that no two are in one place

    def same(call: Callable[[Decoder], Tensor]) -> None:
        got, want = (call(decoder) for decoder in pair)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)
        assert pair[0].lengths == pair[1].lengths
        assert pair[0].cache.at.tolist() == pair[0].lengths
        graphs.update(captured._graphs.values())

    same(lambda d: d.prefill(ids[:, :9], [9, 2, 5]))
    for t in range(9, 150):
        same(partial(Decoder.step, token=ids[:, t]))
    assert len(graphs) == (1 if rolls else 4)  # rooms of 24, 48, 96 and 160 positions
    same(lambda d: d.extend(ids[:, 150:153]))
    for decoder in pair:
        decoder.truncate([n - 2 for n in decoder.lengths])
        decoder.reorder(torch.tensor([2, 0, 1], device=device))
    same(lambda d: d.extend(ids[:, 4:7]))
    same(lambda d: d.step(ids[:, 5]))
    for decoder in pair:
        decoder.reorder(torch.tensor([1, 0], device=device))
    same(lambda d: d.step(ids[:2, 5]))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.9)
    same(lambda d: d.step(ids[:2, 6]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or SANITIZED, reason="needs CUDA graphs")
def test_a_captured_step_waits_for_nothing(device: str) -> None:
    decoder = Decoder(model_of("llama").to(device), 2)
    token = tokens(2, 1)[:, 0].to(device)
    decoder.prefill(tokens(2, 5).to(device), [5, 3])
    decoder.step(token)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            decoder.step(token)
    finally:
        torch.cuda.set_sync_debug_mode("default")
