"""Moestro: from one dense checkpoint and a few domain corpora to a served Mixture-of-Experts model.

Every stage is a function of this package, with the name it has in a config: `moestro.mix(config, ...)`.
(`rl`, whose package has the same name, is `moestro.rl.rl`.)
Importing the package is cheap; a stage's machinery is loaded when it is first asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moestro.branching import branch as branch
    from moestro.compression import compress as compress
    from moestro.data.corpus import corpus as corpus
    from moestro.data.tokens import tokens as tokens
    from moestro.deployment import deploy as deploy
    from moestro.evaluation import evaluate as evaluate
    from moestro.mixing import append as append
    from moestro.mixing import mix as mix
    from moestro.mixing import remove as remove
    from moestro.profiling import profile as profile
    from moestro.seeding import seed as seed
    from moestro.steering import steer as steer
    from moestro.tuning import tune as tune

_STAGES = (
    "append",
    "branch",
    "compress",
    "corpus",
    "deploy",
    "evaluate",
    "mix",
    "profile",
    "remove",
    "seed",
    "steer",
    "tokens",
    "tune",
)
__all__ = [  # noqa: PLE0604  (names are loaded lazily)
    *_STAGES,
]


def __getattr__(name: str) -> Any:
    if name not in _STAGES:
        raise AttributeError(f"module 'moestro' has no attribute {name!r}")
    from moestro.stages import STAGES

    return STAGES[name].load()
