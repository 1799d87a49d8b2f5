"""Checkpoints: written whole or not at all, by any number of ranks, and never run code when read.

    out/step-00001000/
        config.json            format, version, the model's configuration, which layers have LoRA
        tokenizer.json
        train.json             step, held-out loss, and what else training needs to go on
        model/                 weights, under the model's own names: one safetensors file a rank
        optimizer/             the optimizer's tensors: exp_avg.<parameter>, step.<parameter>, ...
        SHA256SUMS             of every file above; `sha256sum -c SHA256SUMS` checks it

The files of model/ and optimizer/ are those of torch.distributed.checkpoint: each holds slices of
tensors and says where in them they belong, so that any number of ranks can read what any number
has written. A checkpoint is made in a hidden folder beside, forced to disk, and renamed; only then
are older ones hidden and removed. A process killed at any moment leaves the last complete one in
place and no torn one in sight; what the disk spoils later the sums tell.
"""

from fastgpt.train.checkpoint.checkpointer import CheckpointConfig, Checkpointer
from fastgpt.train.checkpoint.folder import best, checkpoints, find, verify
from fastgpt.train.checkpoint.read import export, load, model_config, read_json

__all__ = [
    "CheckpointConfig", "Checkpointer", "best", "checkpoints", "export", "find", "load",
    "model_config", "read_json", "verify",
]  # fmt: skip
