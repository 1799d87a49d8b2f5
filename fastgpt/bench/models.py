"""GPT-2 as a whole: a training step, the reading of a prompt, and writing on from it.

Every provider has the same weights in the same dtype, no dropout, and PyTorch's fused AdamW after
clipping where it has no optimizer of its own; fastgpt's keeps float32 moments of 16-bit weights,
where PyTorch's are of 16 bits. Hugging Face's values are the standard, or nanoGPT's
where only that is here.
"""

import contextlib
import gc
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.bench.case import TOLERANCE, Start, relative
from fastgpt.generate import generate
from fastgpt.lab.memory import saved_bytes
from fastgpt.layouts import weights_to
from fastgpt.model import GPT, GPTConfig
from fastgpt.optim import AdamW

MODELS = ("step", "prefill", "decode")
OURS, NANOGPT, HUGGING_FACE = "fastgpt", "nanoGPT", "Hugging Face"
COMPILED = " compiled"
LR = 1e-4


def sizes(what: str, device: str) -> dict[str, int]:
    """GPT-2 small; N is how many tokens are written."""
    shape = {"L": 12, "H": 12, "C": 768, "V": 50257}
    if what == "decode":
        return {"B": 1, "T": 16, "N": 64} | shape
    return ({"B": 16, "T": 1024} if device == "cuda" else {"B": 4, "T": 256}) | shape


class Model:
    """One of MODELS at one size; see `case.Work`."""

    def __init__(
        self, what: str, device: str, dtype: torch.dtype, sizes: dict[str, int],
        nanogpt: Path | None = None,
    ) -> None:  # fmt: skip
        self.what, self.device, self.dtype, self.sizes = what, device, dtype, sizes
        length = sizes["T"] + sizes.get("N", 0)
        config = GPTConfig(length, sizes["V"], sizes["L"], sizes["H"], sizes["C"])
        self.config = config
        self.absent: dict[str, str] = {}
        self._makers: dict[str, Callable[[dict[str, Tensor]], nn.Module]] = {OURS: self._own}
        if find_spec("transformers"):
            self._makers[HUGGING_FACE] = self._hugging_face
        else:
            self.absent[HUGGING_FACE] = "the package transformers is not installed"
        if nanogpt:
            self._source = read_nanogpt(nanogpt)
            self._makers[NANOGPT] = self._nanogpt
        else:
            self.absent[NANOGPT] = "--nanogpt must say where its model.py is"
        if what != "decode":
            for name in (HUGGING_FACE, NANOGPT):
                if name in self._makers:
                    self._makers[name + COMPILED] = self._makers[name]
                else:
                    self.absent[name + COMPILED] = self.absent[name]
        self._idx = torch.randint(sizes["V"], (sizes["B"], sizes["T"] + 1), device=device)
        self._models: dict[str, nn.Module] = {}
        self._compiled: dict[str, Any] = {}
        self._weights: dict[str, Tensor] = {}

    @property
    def name(self) -> str:
        return f"{self.what} {', '.join(f'{k}={v}' for k, v in self.sizes.items())}"

    @property
    def modes(self) -> tuple[str, ...]:
        return (self.what,)

    @property
    def offers(self) -> tuple[str, ...]:
        return tuple(self._makers)

    @property
    def standard(self) -> str | None:
        return next((n for n in (HUGGING_FACE, NANOGPT) if n in self._makers), None)

    @property
    def bytes_needed(self) -> int:
        """At least: the weights; for a step their gradients and two moments too."""
        with torch.device("meta"):
            numel = GPT(self.config).num_params()
        return numel * self.dtype.itemsize * (4 if self.what == "step" else 1)

    # Models of one set of weights

    def _model(self, provider: str) -> nn.Module:
        name = provider.removesuffix(COMPILED)
        if not self._weights:
            torch.manual_seed(0)
            self._weights = {n: t.detach() for n, t in GPT(self.config).state_dict().items()}
        if provider not in self._models:
            model = self._makers[name](self._weights).to(self.device, self.dtype)
            self._models[provider] = model.train(self.what == "step")
        return self._models[provider]

    def _run(self, provider: str) -> Any:
        """The model as it is called."""
        model = self._model(provider)
        if provider.endswith(COMPILED) and provider not in self._compiled:
            self._compiled[provider] = torch.compile(model, dynamic=False)
        return self._compiled.get(provider, model)

    def _own(self, weights: dict[str, Tensor]) -> nn.Module:
        model = GPT(self.config)
        model.load_state_dict(weights)
        return model

    def _hugging_face(self, weights: dict[str, Tensor]) -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        c = self.config
        model: nn.Module = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd,
                n_layer=c.n_layer, n_head=c.n_head, resid_pdrop=0.0, embd_pdrop=0.0,
                attn_pdrop=0.0, attn_implementation="sdpa", bos_token_id=None, eos_token_id=None,
            )
        )  # fmt: skip
        model.loss_type = "ForCausalLM"  # type: ignore[assignment]  # its default, but for a warning
        _load(model, weights_to(weights, c), HUGGING_FACE)
        return model

    def _nanogpt(self, weights: dict[str, Tensor]) -> nn.Module:
        c, theirs = self.config, self._source
        shape = theirs.GPTConfig(
            block_size=c.block_size, vocab_size=c.vocab_size, n_layer=c.n_layer,
            n_head=c.n_head, n_embd=c.n_embd, dropout=0.0, bias=True,
        )  # fmt: skip
        with contextlib.redirect_stdout(None):  # it prints its size
            model: nn.Module = theirs.GPT(shape)
        _load(model, {f"transformer.{n}": t for n, t in weights.items()}, NANOGPT)
        return model

    def _loss(self, provider: str) -> Callable[[], Tensor]:
        idx, targets = self._idx[:, :-1].contiguous(), self._idx[:, 1:].contiguous()
        model: Any = self._model(provider)
        if provider.startswith(OURS):
            return lambda: model(idx, targets)
        run = self._run(provider)
        if provider.startswith(NANOGPT):
            return lambda: run(idx, targets)[1]
        # Its labels are shifted by the model.
        return lambda: run(idx, labels=idx, shift_labels=targets, use_cache=False).loss

    def _last_logits(self, provider: str) -> Callable[[], Tensor]:
        idx = self._idx[:, :-1].contiguous()
        model: Any = self._model(provider)
        if provider.startswith(OURS):

            def read() -> Tensor:
                hidden = model.hidden(idx, model.new_cache(len(idx), idx.shape[1]))
                logits: Tensor = model.logits(hidden[:, -1:])
                return logits

            return read
        run = self._run(provider)
        if provider.startswith(NANOGPT):
            return lambda: run(idx)[0]
        return lambda: run(idx, logits_to_keep=1, use_cache=True).logits

    def _written(self, provider: str) -> Callable[[], Tensor]:
        idx, new = self._idx[:, :-1].contiguous(), self.sizes["N"]
        model: Any = self._model(provider)
        if provider.startswith(OURS):
            return lambda: generate(model, idx, new, temperature=0.0)
        if provider.startswith(NANOGPT):
            return lambda: model.generate(idx, new, top_k=1)
        mask = torch.ones_like(idx)
        return partial(
            model.generate, idx, attention_mask=mask, max_new_tokens=new, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip

    # What is asked of a `case.Work`

    def first(self, provider: str, mode: str) -> Any:
        if self.what == "step":
            return self._loss_and_norm(provider)
        return self.start(provider, mode)()

    def wrong(self, provider: str, mode: str) -> str | None:
        if self.standard is None or provider == self.standard:
            return None
        wide = TOLERANCE[self.dtype]
        if self.what == "decode":
            return self._unlikely(provider, wide)
        if self.what == "prefill":
            with torch.no_grad():
                want, got = (self._last_logits(p)().flatten() for p in (self.standard, provider))
            offs, wide = {"logits": relative(got, want)}, 2 * wide
        else:
            found = [self._loss_and_norm(p) for p in (self.standard, provider)]
            offs = {n: relative(found[1][n], found[0][n]) for n in found[0]}
        for name, off in offs.items():
            if not off <= wide:
                return f"{name} differs from {self.standard}'s by {off:.2g}, more than {wide:.2g}"
        return None

    def _loss_and_norm(self, provider: str) -> dict[str, Tensor]:
        model = self._model(provider)
        loss = self._loss(provider)()
        loss.backward()
        norms = [p.grad.float().norm() for p in model.parameters() if p.grad is not None]
        model.zero_grad(set_to_none=True)
        return {"loss": loss.detach(), "the gradient's norm": torch.stack(norms).norm()}

    def _unlikely(self, provider: str, wide: float) -> str | None:
        """Whether a token was written that the standard finds less likely than its first choice."""
        assert self.standard is not None
        T = self.sizes["T"]
        with torch.no_grad():
            ids = self._written(provider)()
            if ids.shape != (self.sizes["B"], T + self.sizes["N"]):
                return f"it wrote ids of the shape {tuple(ids.shape)}"
            out: Any = self._model(self.standard)
            if self.standard == NANOGPT:
                logits = out(ids, ids)[0]
            else:
                logits = out(ids).logits
        logits = logits[:, T - 1 : -1].float()
        taken = logits.gather(2, ids[:, T:, None])[..., 0]
        off = float(((logits.amax(2) - taken).max() / logits.abs().max()).item())
        if off <= wide:
            return None
        return f"{self.standard} finds a token it wrote {off:.2g} below the likeliest"

    def start(self, provider: str, mode: str) -> Start:
        if self.what == "prefill":
            return _without_gradient(self._last_logits(provider))
        if self.what == "decode":
            return _without_gradient(self._written(provider))
        loss = self._loss(provider)
        params = list(self._model(provider).parameters())
        own = provider.startswith(OURS)
        optimizer: torch.optim.Optimizer
        if own:
            optimizer = AdamW(params, LR, max_grad_norm=1.0)
        else:
            optimizer = torch.optim.AdamW(params, LR, fused=True)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            loss().backward()
            if not own:  # which clips by itself
                nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()

        return step

    def saved(self, provider: str) -> int | None:
        if self.what != "step" or provider.endswith(COMPILED):
            return None
        return saved_bytes(self._loss(provider), self._model(provider).parameters())

    def counts(self, mode: str) -> dict[str, int]:
        s, size = self.sizes, self.dtype.itemsize
        with torch.device("meta"):
            model = GPT(self.config)
        if self.what == "decode":
            # A token reads every weight but the positions'.
            read = (model.num_params() - self.config.block_size * s["C"]) * size
            return {"bytes": s["N"] * read, "tokens": s["B"] * s["N"]}
        training = self.what == "step"
        return {"flops": s["B"] * model.flops(s["T"], training), "tokens": s["B"] * s["T"]}

    def close(self) -> None:
        self._models.clear()
        self._compiled.clear()
        gc.collect()


def _without_gradient(f: Callable[[], Tensor]) -> Start:
    def run() -> Tensor:
        with torch.no_grad():
            return f()

    return run


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
