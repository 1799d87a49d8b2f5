"""fastgpt: fused Triton kernels that GPT models train and generate with.

Names are found when they are first used, so that `fastgpt --help` does without torch. A program
saved by torch.export needs `import fastgpt.ops`, which registers the ops, before it is loaded.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgpt import functional, huggingface, ops, optim
    from fastgpt.compress import compress
    from fastgpt.generation.beam import beam_search
    from fastgpt.generation.completion import complete
    from fastgpt.generation.tokens import generate, stream
    from fastgpt.interpret import capture_attention
    from fastgpt.model import GPT, GPTConfig
    from fastgpt.ops.backend import explain, use
    from fastgpt.patching import patch
    from fastgpt.tune import tune
    from fastgpt.warmup import warmup

__version__ = "0.1.0"
__all__ = [
    "GPT",
    "GPTConfig",
    "beam_search",
    "capture_attention",
    "complete",
    "compress",
    "explain",
    "functional",
    "generate",
    "huggingface",
    "ops",
    "optim",
    "patch",
    "stream",
    "tune",
    "use",
    "warmup",
]
_MODULES = ("functional", "huggingface", "ops", "optim")
_HOMES = {
    "GPT": "model", "GPTConfig": "model", "explain": "ops.backend", "use": "ops.backend",
    "beam_search": "generation.beam", "complete": "generation.completion",
    "compress": "compress", "generate": "generation.tokens", "stream": "generation.tokens",
    "patch": "patching", "tune": "tune", "warmup": "warmup", "capture_attention": "interpret",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"fastgpt.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'fastgpt' has no attribute {name!r}")
    found = getattr(import_module(f"fastgpt.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Python puts a module that it imported here: fastgpt.tune stays the function.
        if isinstance(value, ModuleType) and _HOMES.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
