"""`fastgpt bench`: ways to compute one thing, timed against each other, if their numbers agree.

`ops` has one file an op: its sizes, and who else computes it; `models` GPT-2's training step,
prefill and decode. `measure` gates and times, `run` goes through all that was asked for and writes
`result`'s files, `compare` holds two of them side by side.
"""
