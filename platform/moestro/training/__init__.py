"""The one training loop that seed, branch and tune share.

`loop` runs the steps, `plan` says how many, by `flops` or time, `optimizer` builds AdamW and its schedule, `state`
keeps resumable checkpoints, `routing_losses` holds what is added to the cross entropy of a Mixture-of-Experts,
`history` what is written down. `held_out` stops a run that no longer improves, `divergence` one that cannot go on.
`objective` is the cross entropy itself, `parallel` what workers share; `attention`, `linear`, `cross_entropy`, `peak`
and `runtime` are about speed and determinism on a CPU.
"""
