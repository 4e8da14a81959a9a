"""Benchmarks of rollout routing replay and of what surrounds it: does it hold, what does it cost, does it help.

`models` are those that are measured, `batches` their rollouts, `parity`, `cost` and `training` the benchmarks.
"""
