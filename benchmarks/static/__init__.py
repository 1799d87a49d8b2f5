"""The goals' table: what the compiler and autograd made of fastgpt and of its peers, met or not.

    python -m benchmarks.static --peers DIR --tutorials DIR --markdown docs/performance.md

Needs no GPU. `kernels` holds the goals on machine code, `step` those on a training step, `host`
those on Python between call and launch, `report` the tables.
"""
