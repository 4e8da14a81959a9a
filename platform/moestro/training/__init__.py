"""The one training loop that seed, branch and tune share.

`loop` runs the steps, `optimizer` builds AdamW and its schedule, `state` keeps resumable checkpoints, `losses` holds
what is added to the cross entropy of a Mixture-of-Experts, `history` what is written down. `objective` is the cross
entropy itself; `attention`, `cross_entropy` and `runtime` are about speed and determinism on a CPU.
"""
