"""The lifecycle on one page.

    corpus -> seed -> tokens -> branch -> mix -> tune -> rl -> compress -> deploy
    after every stage: evaluate (held-out loss per domain, task accuracy) and profile (who routes where)

`walk` says what depends on what. `stages.lifecycle` runs it as a Prefect flow, `plan.Plan` walks it without running
anything.
"""

from typing import Any, Protocol

from moestro.config import AnyBranch, Config, ImportBranch, LifecycleConfig


class Run(Protocol):
    """Runs, or plans, one step; what it returns stands for the step's artifact as an input of others."""

    def __call__(self, name: str, stage: str, config: Config, **inputs: Any) -> Any:
        """The artifact of `stage` for `config` and `inputs`, or a promise of it."""


def walk(config: LifecycleConfig, run: Run) -> None:
    """The whole lifecycle, top to bottom."""

    def measure(name: str, model: Any, *, is_moe: bool) -> None:
        run(f"evaluate {name}", "evaluate", config.evaluate, model=model, tokens=tokens)
        if is_moe:
            run(f"profile {name}", "profile", config.profile, model=model, tokens=tokens)

    def text(name: str, branch: AnyBranch) -> dict[str, Any]:
        if isinstance(branch, ImportBranch):
            return {}
        return {"tokens": tokens[name], "general": {other: tokens[other] for other in config.general_text(name)}}

    corpora = {name: run(f"corpus {name}", "corpus", corpus) for name, corpus in config.data.corpus_configs().items()}

    seed = run("seed", "seed", config.seed, corpora={name: corpora[name] for name in config.seed_text()})
    tokens = {
        name: run(f"tokens {name}", "tokens", config.tokens, corpus=corpus, seed=seed)
        for name, corpus in corpora.items()
    }
    measure("seed", seed, is_moe=False)

    branches = {
        name: run(f"branch {name}", "branch", branch, seed=seed, **text(name, branch))
        for name, branch in config.branch_configs().items()
    }
    for name, branch in branches.items():
        measure(f"branch {name}", branch, is_moe=False)

    own = {name: tokens[name] for name in branches}
    model = run("mix", "mix", config.mix, seed=seed, branches=branches, tokens=own)
    measure("mix", model, is_moe=True)

    if config.tune:
        model = run("tune", "tune", config.tune, model=model, tokens=tokens)
        measure("tune", model, is_moe=True)

    if config.rl:
        model = run("rl", "rl", config.rl, model=model)
        measure("rl", model, is_moe=True)

    if config.compress:
        model = run("compress", "compress", config.compress, model=model, tokens=tokens)
        measure("compress", model, is_moe=True)

    if config.deploy:
        run("deploy", "deploy", config.deploy, model=model, tokens=tokens)
