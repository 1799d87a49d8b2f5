"""What a training run of a GPT would take on machines that are not here: memory, traffic, time.

    from fastgpt import GPTConfig, plan

    found = plan.search(GPTConfig.preset("gpt3-175b"), plan.cluster("h100"), 1024, 2048, 2048)
    print(found.best.layout, found.best.step, found.binds)

The command line is `fastgpt plan`; docs/plan.md says what is measured and what is assumed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgpt.plan.best import Plan, batch_sequences, search
    from fastgpt.plan.clusters import CLUSTERS, Cluster, cluster
    from fastgpt.plan.layout import Layout
    from fastgpt.plan.roofline import Estimate, estimate

_HOME = {
    "clusters": ("CLUSTERS", "Cluster", "cluster"),
    "roofline": ("Estimate", "estimate"),
    "layout": ("Layout",),
    "best": ("Plan", "batch_sequences", "search"),
}
__all__ = [
    "CLUSTERS", "Cluster", "Estimate", "Layout", "Plan", "batch_sequences", "cluster", "estimate",
    "search",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """torch is imported with the first name that needs it, not for the command's --help."""
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"fastgpt.plan.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
