"""Training on many devices: rows, weights, heads and positions shared among ranks.

`layout = Layout.start(ParallelConfig(fsdp=2, tp=4), device)` under torchrun, then
`layout.parallelize(model)` and `layout.loss(model, batch)`: each layout equals one process within
rounding.
"""

from fastgpt.parallel.config import ParallelConfig
from fastgpt.parallel.layout import Layout, rank

__all__ = ["Layout", "ParallelConfig", "rank"]
