"""The environment vLLM reads when it is imported: quiet, offline, no children. What the caller has set stays."""

import importlib.metadata
import os
from collections.abc import Mapping

QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "TOKENIZERS_PARALLELISM": "true",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


PLUGINS, PLUGIN = "VLLM_PLUGINS", "moestro"
"""Variable with the names of the plugins that vLLM is to load, and the name of Moestro's."""


def quiet_environment() -> None:
    """Prepare this process for a vLLM that runs in it. Call before vLLM is imported: it reads its settings once."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    os.environ.update(_with_plugin(os.environ))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def server_environment() -> dict[str, str]:
    """The environment of a vLLM server in a process of its own."""
    environment = QUIET | dict(os.environ) | _with_plugin(os.environ)
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    environment["VLLM_LOGGING_LEVEL"] = "INFO"
    return environment


def _with_plugin(environment: Mapping[str, str]) -> dict[str, str]:
    """vLLM's list of plugins with Moestro's in it, if the environment has such a list: without one it takes all."""
    named = environment.get(PLUGINS)
    return {} if named is None else {PLUGINS: ",".join(dict.fromkeys([*filter(None, named.split(",")), PLUGIN]))}


def computes_on_cpu() -> bool:
    """Whether the vLLM that is installed is its build for CPUs, told without importing it."""
    try:
        return "cpu" in importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return True  # that build is the only one which is also published under another name: vllm-cpu
