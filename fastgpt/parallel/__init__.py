"""Training on many devices: rows, weights, heads and positions shared among ranks.

`layout = Layout.start(ParallelConfig(fsdp=2, tp=4), device)` under torchrun, then
`layout.parallelize(model)` and `layout.loss(model, batch)`: each layout equals one process within
rounding. To import this package also teaches DTensor how to share fastgpt's ops, see rules.py.
"""

from fastgpt.parallel import rules
from fastgpt.parallel.config import ParallelConfig
from fastgpt.parallel.layout import Layout, rank

__all__ = ["Layout", "ParallelConfig", "rank"]

rules.learn()
