"""Where reward functions and pairs of answers lie, and their identity: what the files hold, not where they are."""

import importlib.util
from pathlib import Path

from moestro.artifacts import content_fingerprint
from moestro.config import AnyRl, FunctionReward, RlConfig
from moestro.errors import ConfigError, InputError

PYTHON = ".py"


def identify(config: AnyRl) -> dict[str, str]:
    """Fingerprint of every file that the rl stage reads from outside the store: reward functions, pairs of answers.

    Raises `ConfigError` for a function's module that is not there, `InputError` for a file.
    """
    if not isinstance(config, RlConfig):
        pairs = Path(config.pairs).expanduser()
        if not pairs.is_file():
            raise InputError(f"rl.pairs: {config.pairs} does not exist.", hint="Give a JSONL file of pairs.")
        return {"pairs": content_fingerprint({"pairs": pairs})}
    functions = [reward for reward in config.rewards if isinstance(reward, FunctionReward)]
    return {
        f"reward {reward.path.partition(':')[2]}": content_fingerprint({"reward": locate(reward)})
        for reward in functions
    }


def locate(reward: FunctionReward) -> Path:
    """The file that defines the function; raises `ConfigError` if there is none. Nothing is imported but packages."""
    where = reward.path.partition(":")[0]
    if where.endswith(PYTHON):
        path = Path(where).expanduser()
        if not path.is_file():
            raise ConfigError(f"rl.rewards: {where} does not exist.", hint="Give package.module:name or file.py:name.")
        return path
    try:
        spec = importlib.util.find_spec(where)
    except ModuleNotFoundError as error:
        raise ConfigError(f"rl.rewards: there is no module {error.name!r}, of {where}.") from None
    except (Exception, SystemExit) as error:  # of the package around it, or of a name that is none
        raise ConfigError(f"rl.rewards: {where} cannot be found: {type(error).__name__}: {error}.") from error
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise ConfigError(
            f"rl.rewards: there is no module {where!r}.", hint="Give package.module:name or file.py:name."
        )
    return Path(spec.origin)
