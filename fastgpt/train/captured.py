"""A training step as one CUDA graph: the host launches once, not hundreds of times."""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result", bound=Tensor | tuple[Tensor, ...])


class CapturedStep(Generic[Result]):
    """step(*inputs), recorded once as a CUDA graph and then replayed on other inputs.

    A small model's step is launched by the host more slowly than the GPU runs it; a graph takes
    the host out. What step does must be the same each time: shapes, tensors, branches. Gradients
    are best reset first, by `optimizer.zero_grad(set_to_none=True)`, so that the graph owns them;
    a learning rate that changes must be a tensor on the GPU, which is filled in place. fastgpt's
    ops, dropout's seeds and `fastgpt.optim.AdamW` with clipping and `skip_nonfinite` are made for
    that: none of them waits for the GPU, and each replay drops out anew.

    Args:
        step: forward, backward and the optimizer; returns a tensor or a tuple of them.
        examples: inputs of the shapes and dtypes to come, on the GPU.
        warmup: how often step is run before it is recorded, for compilers and optimizer states.
            These are real steps.

    Raises:
        ValueError: there is no GPU, or an example is not on it.

    Attributes:
        graph: the torch.cuda.CUDAGraph.

    https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture
    """

    def __init__(self, step: Callable[..., Result], *examples: Tensor, warmup: int = 3) -> None:
        if not torch.cuda.is_available():
            raise ValueError("CapturedStep: needs a GPU with CUDA graphs; got none")
        for n, x in enumerate(examples):
            if not x.is_cuda:
                raise ValueError(
                    f"CapturedStep: examples must be on the GPU; got {n} on {x.device}"
                )
        self.inputs = [x.clone() for x in examples]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(warmup):
                step(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = step(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Result:
        """Run the step on other inputs; the result is overwritten by the next call.

        Raises:
            ValueError: an input has another shape or dtype than its example.
        """
        if len(inputs) != len(self.inputs):
            raise ValueError(f"CapturedStep: takes {len(self.inputs)} inputs; got {len(inputs)}")
        for n, (own, x) in enumerate(zip(self.inputs, inputs, strict=True)):
            if own.shape != x.shape or own.dtype != x.dtype:
                raise ValueError(
                    f"CapturedStep: input {n} must be {tuple(own.shape)} {own.dtype} as recorded;"
                    f" got {tuple(x.shape)} {x.dtype}"
                )
            own.copy_(x, non_blocking=True)
        self.graph.replay()
        return self.result
