"""fastgpt's kernels behind torch.nn.functional's own signatures.

    import fastgpt.functional as F

Each function takes what torch's takes, and returns what torch's returns. Where a kernel cannot take
an argument torch's own function runs, which is also what refuses bad input, in its own words;
`fastgpt.explain()` tells which of the two ran, and why. With `fastgpt.use("triton")` that is an
error. Two things differ on a GPU. Dropout inside of a kernel drops other elements than torch does
with the same seed. And ids or targets out of range are not asserted there: such an id embeds to
zero, the loss of such a target is NaN.
"""

from fastgpt.functional.attention import scaled_dot_product_attention
from fastgpt.functional.embedding import embedding
from fastgpt.functional.hook import Hook, register_sdpa
from fastgpt.functional.loss import cross_entropy, linear_cross_entropy
from fastgpt.functional.norm import layer_norm, rms_norm
from fastgpt.functional.plain import dropout, gelu, linear

__all__ = [
    "Hook",
    "cross_entropy",
    "dropout",
    "embedding",
    "gelu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "register_sdpa",
    "rms_norm",
    "scaled_dot_product_attention",
]
