"""Optimizers: AdamW on the fused op, Muon for matrices beside it, and who of a model decays."""

from fastgpt.optim.adamw import AdamW
from fastgpt.optim.groups import decay_groups
from fastgpt.optim.muon import MuonAdamW

__all__ = ["AdamW", "MuonAdamW", "decay_groups"]
