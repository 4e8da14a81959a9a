"""How a vLLM engine is told about steering profiles, and a request about its own. Imports nothing heavy.

A request names its profile in `vllm_xargs` (in process: `SamplingParams.extra_args`) under `PROFILE_ARGUMENT`, and must
carry `cache_salt(profile)`: keys and values depend on the routing, and without a salt of its own a steered request
would read, and leave behind, those of others.
"""

import json
from collections.abc import Mapping
from pathlib import Path

PROFILE_ARGUMENT = "moestro_profile"
RESERVED_ARGUMENTS = "moestro_"
"""How the names of arguments begin that no client may set."""
RESERVED_SALTS = "moestro-"
"""How salts begin that no client may choose."""
PROFILES_KEY = "moestro_profiles"
"""The field of vLLM's additional config with the files of profiles by id."""
KNOWN_PROFILES = "MOESTRO_STEERING_PROFILES"
"""Environment of a server: the ids of its profiles, separated by commas."""
WORKER = "moestro.inference.steering_worker.SteeringWorker"
CHECK = "moestro.inference.steering_check:KnownProfiles"


def cache_salt(profile: str, own: str = "") -> str:
    """The prefix cache's salt for requests under `profile`, whose client may have chosen one of its own."""
    return f"{RESERVED_SALTS}steering:{profile}:{own}"


def steering_arguments(profiles: Mapping[str, Path]) -> tuple[list[str], dict[str, str]]:
    """Further command line arguments and environment of a vLLM server that knows `profiles` (file or folder by id).

    Both are empty without profiles: such a server is vLLM's own.
    """
    if not profiles:
        return [], {}
    files = {name: str(path) for name, path in sorted(profiles.items())}
    arguments = ["--worker-cls", WORKER, "--logits-processors", CHECK]
    arguments += ["--additional-config", json.dumps({PROFILES_KEY: files})]
    return arguments, {"VLLM_USE_V2_MODEL_RUNNER": "0", KNOWN_PROFILES: ",".join(files)}
