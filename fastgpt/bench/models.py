"""GPT-2 as a whole: a training step, the reading of a prompt, and writing on from it.

Values are held against Hugging Face's in float32, or nanoGPT's where only that is here. On a CPU
each provider runs in a process of its own (`worker`), on a GPU all run in this one.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgpt.bench import timing
from fastgpt.bench.case import Start, relative
from fastgpt.bench.players import (
    CAPTURED,
    COMPILED,
    CTRANSLATE2,
    HUGGING_FACE,
    LLAMA_CPP,
    NANOGPT,
    OURS,
    PATCHED,
    WEIGHTS,
    Player,
    Role,
    Torch,
    player,
    read_nanogpt,
)
from fastgpt.bench.worker import Child
from fastgpt.model import GPT

MODELS = ("step", "prefill", "decode")
# Of the largest value.
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 2e-2, "autocast": 2e-2, "int8": 5e-2}
WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2, "autocast": 4, "int8": 1}  # bytes a weight


def sizes(what: str, device: str) -> dict[str, int]:
    """GPT-2 small; N is how many tokens are written."""
    shape = {"L": 12, "H": 12, "C": 768, "V": 50257}
    if what == "decode":
        return {"B": 1, "T": 16, "N": 64} | shape
    return ({"B": 16, "T": 1024} if device == "cuda" else {"B": 4, "T": 256}) | shape


def takes(what: str, precision: str) -> bool:
    """autocast is for training, int8 for writing."""
    return {"autocast": what == "step", "int8": what == "decode"}.get(precision, True)


def missing(what: str, device: str, precision: str, nanogpt: Path | None) -> dict[str, str]:
    """Providers that cannot be here, and why."""
    why = {}
    if not find_spec("transformers"):
        why[HUGGING_FACE] = "the package transformers is not installed"
    elif precision == "int8":
        why[HUGGING_FACE] = "it has no 8-bit weights of its own for a CPU"
    if nanogpt is None:
        why[NANOGPT] = "--nanogpt must say where its model.py is"
    elif precision == "int8":
        why[NANOGPT] = "it has no 8-bit weights"
    if what != "decode":
        return why | {
            n + how: w for n, w in why.items() if n != OURS for how in (COMPILED, PATCHED)
        }
    for name, packages in {
        CTRANSLATE2: ("ctranslate2", "transformers"),
        LLAMA_CPP: ("llama_cpp", "gguf"),
    }.items():
        lacks = [package for package in packages if not find_spec(package)]
        if lacks:
            why[name] = f"the package {lacks[0]} is not installed"
        elif device != "cpu":
            why[name] = "it is timed on a CPU"
    return why


class Model:
    """One of MODELS at one size; see `case.Work`.

    Args:
        alone: each provider in a process of its own; on a CPU without.
    """

    def __init__(
        self, what: str, device: str, precision: str, sizes: dict[str, int],
        nanogpt: Path | None = None, alone: bool | None = None,
    ) -> None:  # fmt: skip
        self.what, self.device, self.precision, self.sizes = what, device, precision, sizes
        self.absent = missing(what, device, precision, nanogpt)
        self._nanogpt = nanogpt
        self._alone = device == "cpu" if alone is None else alone
        if nanogpt:
            read_nanogpt(nanogpt)  # to say so before minutes of work
        self.config = self._role(OURS).config
        self._players: dict[tuple[str, str], Player] = {}
        self._values: dict[tuple[str, str], dict[str, Tensor]] = {}

    @property
    def name(self) -> str:
        return f"{self.what} {', '.join(f'{k}={v}' for k, v in self.sizes.items())}"

    @property
    def modes(self) -> tuple[str, ...]:
        return (self.what,)

    @property
    def offers(self) -> tuple[str, ...]:
        others: tuple[str, ...] = (CTRANSLATE2, LLAMA_CPP)
        if self.what != "decode":
            others = (HUGGING_FACE + COMPILED, NANOGPT + COMPILED)
        if self.what == "step" and self.device == "cuda":
            others = (OURS + CAPTURED, HUGGING_FACE + PATCHED, *others)
        return tuple(n for n in (OURS, HUGGING_FACE, NANOGPT, *others) if n not in self.absent)

    @property
    def standard(self) -> str | None:
        if find_spec("transformers"):
            return HUGGING_FACE
        return NANOGPT if self._nanogpt else None

    def bytes_needed(self) -> int:
        """At least, of any provider: what fastgpt's training step takes on fake tensors, or the
        weights and the keys and values of all that is read and written."""
        with torch.device("meta"):
            numel = GPT(self.config).num_params()
        weights = numel * WIDTHS[self.precision]
        s = self.sizes
        if self.what != "step":
            kept = 2 * s["L"] * s["B"] * (s["T"] + s.get("N", 0)) * s["C"]
            return weights + kept * WEIGHTS[self.precision].itemsize
        with FakeTensorMode():
            model = GPT(self.config)
            idx = torch.zeros(s["B"], s["T"], dtype=torch.int64)

            def step() -> None:
                model(idx, idx).backward()

            # float32, of which 16-bit tensors are half; two moments come to the gradients
            made = timing.peak_bytes(step, "cpu") * WEIGHTS[self.precision].itemsize // 4
        return made + 3 * weights

    def _role(self, provider: str, precision: str | None = None) -> Role:
        return Role(
            self.what, provider, self.device, precision or self.precision, self.sizes,
            self._nanogpt,
        )  # fmt: skip

    def _player(self, provider: str, precision: str | None = None) -> Player:
        key = provider, precision or self.precision
        if key not in self._players:
            role = self._role(*key)
            self._players[key] = Child(role) if self._alone else player(role)
        return self._players[key]

    # What is asked of a `case.Work`

    def ready(self, provider: str) -> None:
        one = self._player(provider)
        if isinstance(one, Child):
            one.ready()

    def first(self, provider: str, mode: str) -> Any:
        return self._judged(provider, self.precision)

    def _judged(self, provider: str, precision: str) -> dict[str, Tensor]:
        """The values of a provider, found once."""
        key = provider, precision
        if key not in self._values:
            self._values[key] = self._player(*key).values()
        return self._values[key]

    def wrong(self, provider: str, mode: str) -> str | None:
        if self.standard is None or (provider, self.precision) == (self.standard, "float32"):
            return None
        wide = TOLERANCE[self.precision]
        got = self._judged(provider, self.precision)
        if self.what == "decode":
            return self._unlikely(got["ids"], self._player(self.standard, "float32"), wide)
        want = self._judged(self.standard, "float32")
        if self.what == "prefill":
            wide *= 2
        for name in want:
            off = relative(got[name], want[name])
            if not off <= wide:
                return f"{name} differs from {self.standard}'s by {off:.2g}, more than {wide:.2g}"
        return None

    def _unlikely(self, ids: Tensor, judge: Player, wide: float) -> str | None:
        """Whether a token was written that the standard finds less likely than its first choice."""
        T = self.sizes["T"]
        if ids.shape != (self.sizes["B"], T + self.sizes["N"]):
            return f"it wrote ids of the shape {tuple(ids.shape)}"
        logits = judge.logits(ids)[:, T - 1 : -1].float()
        taken = logits.gather(2, ids[:, T:, None].to(logits.device))[..., 0]
        off = float(((logits.amax(2) - taken).max() / logits.abs().max()).item())
        if off <= wide:
            return None
        return f"{self.standard} finds a token it wrote {off:.2g} below the likeliest"

    def start(self, provider: str, mode: str) -> Start:
        judge = self._players.get((self.standard or "", "float32"))
        if isinstance(judge, Child) and self.precision != "float32":
            judge.close()  # its memory is for those that are timed
        return self._player(provider).start()

    def memory(self, provider: str, call: Start) -> tuple[int | None, int | None]:
        one = self._player(provider)
        if isinstance(one, Child):
            return one.memory()
        added = timing.peak_bytes(call, self.device)
        held = one.held() if self.device == "cuda" and isinstance(one, Torch) else 0
        return added, held + added if held else None

    def saved(self, provider: str) -> int | None:
        return self._player(provider).saved()

    def counts(self, mode: str) -> dict[str, int]:
        s = self.sizes
        with torch.device("meta"):
            model = GPT(self.config)
        if self.what == "decode":
            # A token reads every weight but the positions'.
            read = (model.num_params() - self.config.block_size * s["C"]) * WIDTHS[self.precision]
            return {"bytes": s["N"] * read, "tokens": s["B"] * s["N"]}
        training = self.what == "step"
        return {"flops": s["B"] * model.flops(s["T"], training), "tokens": s["B"] * s["T"]}

    def close(self) -> None:
        for one in self._players.values():
            if isinstance(one, Child):
                one.close()
        self._players.clear()
