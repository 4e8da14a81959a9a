"""Reinforcement learning on rollouts from vLLM with rollout routing replay (R3), and DPO, its offline sibling.

`stage` is the walk through one run, `curriculum` the problems, `sampling` what the engine answered and earned, `ahead`
when it is asked, `records` that on disk, `rollouts` it as one batch, `rewards` and `advantages` what it is worth,
`policy` the trainer's log-probabilities under a given routing, `routing` which one, `objectives`, `correction` and
`divergence` the formulas, `update` the optimiser steps, `preflight` and `probe` the checks that engine and trainer are
one policy, `engine` what happens when the engine dies, `history` the figures per update, `preferences` DPO.
"""

from moestro.rl.stage import rl

__all__ = ["rl"]
