"""Other people's kernels, launched by their own wrappers in their own configurations.

`calls` names what is compared and how each peer is called; `child` runs the calls for one chip,
with no GPU, in a process of its own, since peers choose their configurations by the chip while they
are imported. Nothing of theirs is in this repository.
"""
