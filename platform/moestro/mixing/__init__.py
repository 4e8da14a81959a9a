"""Branch-Train-MiX: the branches of one seed become one Mixture-of-Experts (arXiv 2403.07816, section 3.2).

`branch_train_mix` is the stage, `compare` refuses branches that are not of one kind with the seed, `router_init`
gives the new routers their first weights.
"""

from moestro.mixing.branch_train_mix import mix

__all__ = ["mix"]
