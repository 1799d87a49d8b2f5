"""One provider's GPT-2 in this process, ready to train, to read a prompt or to write on from it.

Every provider has the same weights, no dropout, and PyTorch's fused AdamW after clipping where it
has no optimizer of its own; fastgpt's keeps float32 moments of 16-bit weights, where PyTorch's are
of 16 bits.
"""

import contextlib
import importlib.util
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastgpt.bench import engines
from fastgpt.bench.case import Start
from fastgpt.generation.tokens import generate
from fastgpt.lab.memory import saved_bytes
from fastgpt.layouts import weights_to
from fastgpt.model import GPT, GPTConfig
from fastgpt.optim import AdamW
from fastgpt.patching import patch
from fastgpt.train.captured import CapturedStep

OURS, NANOGPT, HUGGING_FACE = "fastgpt", "nanoGPT", "Hugging Face"
CTRANSLATE2, LLAMA_CPP = "CTranslate2", "llama.cpp"
COMPILED, CAPTURED, PATCHED = " compiled", " captured", " patched"
LR = 1e-4
WEIGHTS = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
    "autocast": torch.float32, "int8": torch.float32,
}  # fmt: skip


@dataclass(frozen=True)
class Role:
    """What a provider is to do.

    Attributes:
        what: step, prefill or decode.
        precision: of WEIGHTS. autocast: float32 weights, products in bfloat16; int8: 8-bit weights.
        nanogpt: where nanoGPT's model.py is.
    """

    what: str
    provider: str
    device: str
    precision: str
    sizes: dict[str, int]
    nanogpt: Path | None = None

    @property
    def config(self) -> GPTConfig:
        s = self.sizes
        return GPTConfig(s["T"] + s.get("N", 0), s["V"], s["L"], s["H"], s["C"])


class Player(Protocol):
    """What `models.Model` asks of one provider, in this process or another."""

    def values(self) -> dict[str, Tensor]:
        """What it is judged by: loss and gradients' norm, logits, or ids. Nothing is changed."""

    def logits(self, ids: Tensor) -> Tensor:
        """Of these ids, (B, T, V)."""

    def start(self) -> Start:
        """The call that is timed."""

    def saved(self) -> int | None:
        """Bytes kept for backward."""


def player(role: Role) -> Player:
    """Raises ValueError or ImportError if the provider cannot do it, and why."""
    if role.provider in (CTRANSLATE2, LLAMA_CPP):
        return Engine(role)
    return Torch(role)


def prompt(role: Role) -> Tensor:
    """The same ids for all, (B, T + 1); a step's targets are one further on."""
    s = role.sizes
    chance = torch.Generator().manual_seed(1)
    return torch.randint(s["V"], (s["B"], s["T"] + 1), generator=chance)


def own(role: Role) -> GPT:
    torch.manual_seed(0)
    return GPT(role.config)


class Engine:
    """A `Player` that only writes."""

    def __init__(self, role: Role) -> None:
        ids, new, threads = prompt(role)[:, :-1], role.sizes["N"], torch.get_num_threads()
        if role.provider == CTRANSLATE2:
            theirs = hugging_face(own(role), role.config)
            self._write = engines.ctranslate2(theirs, ids, new, role.precision, threads)
        else:
            weights = own(role).state_dict()
            self._write = engines.llama_cpp(weights, role.config, ids, new, role.precision, threads)

    def values(self) -> dict[str, Tensor]:
        return {"ids": self._write()}

    def logits(self, ids: Tensor) -> Tensor:
        raise NotImplementedError("bench: an engine tells no logits")

    def start(self) -> Start:
        return self._write

    def saved(self) -> None:
        return None


class Torch:
    """A `Player` in PyTorch: fastgpt, Hugging Face's model or nanoGPT."""

    def __init__(self, role: Role) -> None:
        self.role = role
        name = role.provider
        for suffix in (COMPILED, CAPTURED, PATCHED):
            name = name.removesuffix(suffix)
        makers: dict[str, Callable[[], nn.Module]] = {
            OURS: lambda: own(role),
            HUGGING_FACE: lambda: hugging_face(own(role), role.config),
            NANOGPT: partial(nanogpt, role),
        }
        model: Any = makers[name]().to(role.device, WEIGHTS[role.precision])
        if role.precision == "int8":
            from fastgpt.compress import compress

            model = compress(model, "int8")
        self.model = model.train(role.what == "step")
        if role.provider.endswith(PATCHED):
            patch(self.model)
        self._name = name
        self._run: Any = self.model
        if role.provider.endswith(COMPILED):
            self._run = torch.compile(self.model, dynamic=False)
        self._optimizer: torch.optim.Optimizer | None = None
        self._pool = 0
        self._idx = prompt(role).to(role.device)

    def _cast(self) -> AbstractContextManager[Any]:
        if self.role.precision == "autocast":
            return torch.autocast(self.role.device, torch.bfloat16)
        return contextlib.nullcontext()

    def _loss(self) -> Tensor:
        idx, targets = self._idx[:, :-1].contiguous(), self._idx[:, 1:].contiguous()
        with self._cast():
            if self._name == OURS:
                loss = self.model(idx, targets)
            elif self._name == NANOGPT:
                loss = self._run(idx, targets)[1]
            else:  # its labels are shifted by the model
                loss = self._run(idx, labels=idx, shift_labels=targets, use_cache=False).loss
        return loss  # type: ignore[no-any-return]

    def _read(self) -> Tensor:
        """The logits after the prompt."""
        idx = self._idx[:, :-1].contiguous()
        with self._cast():
            if self._name == OURS:
                hidden = self.model.hidden(idx, self.model.new_cache(len(idx), idx.shape[1]))
                return self.model.logits(hidden[:, -1:])  # type: ignore[no-any-return]
            if self._name == NANOGPT:
                return self._run(idx)[0]  # type: ignore[no-any-return]
            return self._run(idx, logits_to_keep=1, use_cache=True).logits  # type: ignore[no-any-return]

    def _write(self) -> Tensor:
        idx, new = self._idx[:, :-1].contiguous(), self.role.sizes["N"]
        with self._cast():
            if self._name == OURS:
                return generate(self.model, idx, new, temperature=0.0)
            if self._name == NANOGPT:
                return self.model.generate(idx, new, top_k=1)  # type: ignore[no-any-return]
            return self.model.generate(  # type: ignore[no-any-return]
                idx, attention_mask=torch.ones_like(idx), max_new_tokens=new, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip

    def values(self) -> dict[str, Tensor]:
        if self.role.what == "decode":
            with torch.no_grad():
                return {"ids": self._write()}
        if self.role.what == "prefill":
            with torch.no_grad():
                return {"logits": self._read().flatten()}
        loss = self._loss()
        loss.backward()
        norms = [p.grad.float().norm() for p in self.model.parameters() if p.grad is not None]
        self.model.zero_grad(set_to_none=True)
        return {"loss": loss.detach(), "the gradient's norm": torch.stack(norms).norm()}

    def logits(self, ids: Tensor) -> Tensor:
        ids = ids.to(self.role.device)
        with torch.no_grad():
            if self._name == NANOGPT:
                return self.model(ids, ids)[0]  # type: ignore[no-any-return]
            out = self.model(ids)
            return out if self._name == OURS else out.logits  # type: ignore[no-any-return]

    def start(self) -> Start:
        if self.role.what != "step":
            return torch.no_grad()(self._read if self.role.what == "prefill" else self._write)
        params = list(self.model.parameters())
        mine = self._name == OURS
        optimizer: torch.optim.Optimizer
        if mine:
            optimizer = AdamW(params, LR, max_grad_norm=1.0)
        else:
            optimizer = torch.optim.AdamW(params, LR, fused=True)

        def step() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = self._loss()
            loss.backward()
            if not mine:  # which clips by itself
                nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            return loss.detach()

        self._optimizer = optimizer
        if not self.role.provider.endswith(CAPTURED):
            return step
        before = torch.cuda.memory_reserved()
        graph = CapturedStep(step)
        self._pool = torch.cuda.memory_reserved() - before
        return graph

    def held(self) -> int:
        """Bytes between two steps: weights, moments, and what a graph keeps to itself."""
        there = [*self.model.parameters(), *self.model.buffers()]
        if self._optimizer is not None:
            there += tree_leaves(list(self._optimizer.state.values()))
        return self._pool + sum(t.nbytes for t in there if isinstance(t, Tensor))

    def saved(self) -> int | None:
        if self.role.what != "step" or self.role.provider.endswith((COMPILED, CAPTURED)):
            return None
        return saved_bytes(self._loss, self.model.parameters())


def hugging_face(model: GPT, c: GPTConfig) -> nn.Module:
    """GPT2LMHeadModel with a GPT's weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs: nn.Module = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd,
            n_layer=c.n_layer, n_head=c.n_head, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, attn_implementation="sdpa", bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    theirs.loss_type = "ForCausalLM"  # type: ignore[assignment]  # its default, but for a warning
    weights = {n: t.detach() for n, t in model.state_dict().items()}
    _load(theirs, weights_to(weights, c), HUGGING_FACE)
    return theirs.eval()


def nanogpt(role: Role) -> nn.Module:
    if role.nanogpt is None:
        raise ValueError("bench: --nanogpt must say where nanoGPT's model.py is")
    c, source = role.config, read_nanogpt(role.nanogpt)
    shape = source.GPTConfig(
        block_size=c.block_size, vocab_size=c.vocab_size, n_layer=c.n_layer,
        n_head=c.n_head, n_embd=c.n_embd, dropout=0.0, bias=True,
    )  # fmt: skip
    with contextlib.redirect_stdout(None):  # it prints its size
        theirs: nn.Module = source.GPT(shape)
    weights = own(role).state_dict()
    _load(theirs, {f"transformer.{n}": t.detach() for n, t in weights.items()}, NANOGPT)
    return theirs


def _load(model: nn.Module, weights: dict[str, Tensor], whose: str) -> None:
    """Into another library's model; the tied output layer has no entry of its own."""
    missing, unknown = model.load_state_dict(weights, strict=False)
    missing = [n for n in missing if n != "lm_head.weight" and not n.endswith(".attn.bias")]
    if missing or unknown:
        raise ValueError(f"bench: {whose}'s model must have GPT-2's weights; it has other names")


def read_nanogpt(where: Path) -> ModuleType:
    """nanoGPT's model.py, from the file or its folder."""
    file = where / "model.py" if where.is_dir() else where
    spec = importlib.util.spec_from_file_location("nanogpt_model", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise ValueError(f"bench: --nanogpt must be nanoGPT's folder or its model.py; got {where}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ValueError(f"bench: --nanogpt {where} is not Python; {error}") from None
    if not (hasattr(module, "GPT") and hasattr(module, "GPTConfig")):
        raise ValueError(f"bench: --nanogpt {where} must define GPT and GPTConfig; it does not")
    return module
