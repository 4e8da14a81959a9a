"""The environment vLLM reads when it is imported: quiet, offline, no children. What the caller has set stays."""

import importlib.metadata
import os

QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "TOKENIZERS_PARALLELISM": "true",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def quiet_environment() -> None:
    """Prepare this process for a vLLM that runs in it. Call before vLLM is imported: it reads its settings once."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def server_environment() -> dict[str, str]:
    """The environment of a vLLM server in a process of its own."""
    environment = QUIET | dict(os.environ)
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    environment["VLLM_LOGGING_LEVEL"] = "INFO"
    return environment


def computes_on_cpu() -> bool:
    """Whether the vLLM that is installed is its build for CPUs, told without importing it."""
    try:
        return "cpu" in importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return True  # that build is the only one which is also published under another name: vllm-cpu
