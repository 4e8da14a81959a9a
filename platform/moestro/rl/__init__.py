"""Reinforcement learning: GRPO on a verifiable task with rollouts from vLLM and rollout routing replay (R3).

`stage` is the walk through one run, `curriculum` the problems, `rollouts` what the engine answered and earned as one
batch, `policy` the trainer's log-probabilities with the engine's routing replayed, `grpo` the formulas, `update` the
optimiser steps, `probe` the check that engine and trainer hold the same weights, `history` the figures per update.
"""

from moestro.rl.stage import rl

__all__ = ["rl"]
