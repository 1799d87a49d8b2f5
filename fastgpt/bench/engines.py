"""Engines that are not PyTorch's and only write text: CTranslate2 and llama.cpp.

Both get the weights that the others have, in files of their own format in a temporary folder; at
the same number of threads; and take the likeliest token.
"""

import ctypes
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgpt.config import GPTConfig
from fastgpt.gguf_file import write_gguf

Write = Callable[[], Tensor]


def ctranslate2(theirs: Any, ids: Tensor, new: int, precision: str, threads: int) -> Write:
    """A call that continues ids by new tokens, on CTranslate2.

    Args:
        theirs: a GPT2LMHeadModel.
        precision: float32, or int8 for the weights of its products.

    Raises:
        ValueError: it has not this precision on this processor.
    """
    import ctranslate2 as engine
    from ctranslate2.converters.transformers import GPT2Loader

    compute = {"int8": "int8_float32"}.get(precision, precision)
    if compute not in (has := engine.get_supported_compute_types("cpu")):
        raise ValueError(f"CTranslate2 computes in {', '.join(sorted(has))} here")
    loader = GPT2Loader()
    spec = loader.get_model_spec(theirs)
    words = [f"<{n}>" for n in range(theirs.config.vocab_size)]
    loader.set_vocabulary(spec, words)
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = words[0]
    spec.validate()
    spec.optimize(quantization=compute)
    with tempfile.TemporaryDirectory() as folder:
        spec.save(folder)
        model = engine.Generator(
            folder, device="cpu", compute_type=compute, inter_threads=1, intra_threads=threads
        )
    prompts = [[words[n] for n in row] for row in ids.tolist()]

    def write() -> Tensor:
        found = model.generate_batch(
            prompts, max_batch_size=len(prompts), min_length=new, max_length=new,
            sampling_topk=1, include_prompt_in_result=False, end_token=[],
        )  # fmt: skip
        written = torch.tensor([one.sequences_ids[0] for one in found])
        return torch.cat([ids, written], 1)

    return write


def llama_cpp(
    weights: dict[str, Tensor], config: GPTConfig, ids: Tensor, new: int, precision: str,
    threads: int,
) -> Write:  # fmt: skip
    """A call that continues ids by new tokens, on llama.cpp through llama-cpp-python's bindings.

    Args:
        weights: GPT's state_dict; precision: of the matrices in the file, int8 is Q8_0.
    """
    import llama_cpp as engine

    engine.llama_log_set(_silent(), ctypes.c_void_p(0))
    engine.llama_backend_init()
    B, T = ids.shape
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "gpt2.gguf"
        write_gguf(file, weights, config, precision)
        asked = engine.llama_model_default_params()
        asked.use_mmap = False
        model = engine.llama_model_load_from_file(str(file).encode(), asked)
    shape = engine.llama_context_default_params()
    shape.n_ctx = B * (T + new)
    shape.n_batch = shape.n_ubatch = B * T
    shape.n_seq_max = B
    shape.n_threads = shape.n_threads_batch = threads
    context = model and engine.llama_init_from_model(model, shape)
    if not context:
        raise ValueError("llama.cpp does not load this model")
    memory = engine.llama_get_memory(context)
    batch = engine.llama_batch_init(B * T, 0, 1)

    def read(tokens: Tensor, start: int) -> Tensor:
        """The likeliest token after (B, n) ones that stand at start and beyond."""
        each = tokens.shape[1]
        batch.n_tokens = tokens.numel()
        for i, token in enumerate(tokens.flatten().tolist()):
            batch.token[i], batch.pos[i] = token, start + i % each
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, i // each
            batch.logits[i] = i % each == each - 1
        if engine.llama_decode(context, batch):
            raise RuntimeError("llama.cpp could not decode")
        last = [engine.llama_get_logits_ith(context, each * (b + 1) - 1) for b in range(B)]
        rows = (np.ctypeslib.as_array(row, (config.vocab_size,)) for row in last)
        return torch.tensor([[int(row.argmax())] for row in rows])

    def write() -> Tensor:
        engine.llama_memory_clear(memory, True)
        made = [ids, read(ids, 0)]
        for n in range(1, new):
            made.append(read(made[-1], T + n - 1))
        return torch.cat(made, 1)

    return write


@cache
def _silent() -> Any:
    """Called from C for as long as the process lives."""
    import llama_cpp as engine

    return engine.llama_log_callback(lambda level, text, data: None)
