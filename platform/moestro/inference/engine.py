"""`Engine`, what the rl stage needs of an inference engine, and `VllmEngine`, which is one in this process.

Token ids in, token ids, log-probabilities and expert choices out; no tokenizer. The same weights, seed and prompts
give the same tokens and the same log-probabilities, to the bit, in any process with the same number of threads.

Shapes: P prompt tokens, O sampled tokens, S tokens of a sequence, L layers, K chosen experts.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moestro.errors import InputError
from moestro.inference.environment import quiet_environment
from moestro.inference.routes import check_routes, require_routing, window_is_wide_enough
from moestro.models.files import read_config, weight_files

GIB = 1024**3
WORKER_EXTENSION = "moestro.inference.worker.WorkerExtension"


@dataclass(frozen=True)
class Completion:
    """One sampled continuation."""

    token_ids: list[int]
    """The O sampled tokens, the stop token included."""
    logprobs: np.ndarray
    """float32 [O], nats, of the distribution that was sampled from (temperature applied)."""
    routes: np.ndarray | None
    """[P+O-1, L, K] expert ids; row t is the routing of input token t. None without `EngineConfig.routes`."""
    finish_reason: str
    """`stop` or `length`."""


@dataclass(frozen=True)
class Scored:
    """A given sequence under the model."""

    logprobs: np.ndarray
    """float32 [S-1], nats, of tokens 1 to S-1 at temperature 1."""
    routes: np.ndarray | None
    """[S, L, K] expert ids; row t is the routing of input token t. None without routes."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How prompts are completed."""

    n: int
    """Completions of every prompt."""
    max_tokens: int
    """Longest completion."""
    temperature: float
    """0 is greedy."""
    seed: int
    stop_token_ids: list[int]
    """Nothing but these ends a completion early."""


class Engine(Protocol):
    """Generates, scores, takes new weights."""

    concurrent: bool
    """Whether it computes outside this process, so that another thread may ask it while this one computes."""

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[list[Completion]]:
        """`sampling.n` completions of every prompt."""

    def score(self, sequences: list[list[int]]) -> list[Scored]:
        """Log-probabilities and routing of given sequences of at least two tokens."""

    def refresh(self, folder: Path) -> None:
        """Take the weights of the checkpoint in `folder`, which has the same architecture."""

    def close(self) -> None:
        """Free the engine's memory."""


@dataclass(frozen=True)
class EngineConfig:
    """How an engine runs."""

    dtype: str = "float32"
    """Type it computes in."""
    max_model_len: int = 512
    """Longest prompt with its completion; a scored sequence needs room for one token more."""
    routes: bool = False
    """Return expert choices (MoE only)."""
    kv_cache_gib: float = 0.5
    """Memory of the KV cache in GiB."""
    threads: int | None = None
    """Threads; None leaves them."""


EngineFactory = Callable[[Path, EngineConfig], Engine]


class VllmEngine:
    """vLLM in this process, no children."""

    concurrent = False

    def __init__(self, folder: Path, config: EngineConfig) -> None:
        """Load the checkpoint in `folder`.

        Raises `InputError` if routes are asked for that vLLM does not return, or its config lacks what vLLM reads.
        """
        _check_config(folder)
        hint = "Leave EngineConfig.routes off, or keep max_model_len within the window."
        self._shape = require_routing(folder, config.max_model_len, hint=hint) if config.routes else None
        self._shapes = stored_shapes(folder)
        self._config = config
        quiet_environment()
        with _process_state(config.threads), _model_class(folder):
            from vllm import LLM

            self._llm: Any = LLM(
                str(folder),
                skip_tokenizer_init=True,
                dtype=config.dtype,
                max_model_len=config.max_model_len,
                enforce_eager=True,
                enable_return_routed_experts=config.routes,
                disable_sliding_window=window_is_wide_enough(folder, config.max_model_len),
                kv_cache_memory_bytes=int(config.kv_cache_gib * GIB),
                hf_overrides={"head_dtype": "float32"},  # logits unrounded, as the trainer's (arXiv 2506.13585)
                distributed_executor_backend="uni",
                async_scheduling=False,  # the order of work is then the order of requests
                generation_config="vllm",  # sampling is what the caller says, not what the checkpoint suggests
                logprobs_mode="processed_logprobs",
                worker_extension_cls=WORKER_EXTENSION,
                disable_log_stats=True,
                use_tqdm_on_load=False,
                **self._further_arguments(),
            )

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[list[Completion]]:
        """See `Engine`. Raises `InputError` for prompts that leave no room for `sampling.max_tokens`."""
        from vllm import SamplingParams

        self._check_room(prompts, sampling.max_tokens)
        params = SamplingParams(
            n=sampling.n,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            stop_token_ids=sampling.stop_token_ids,
            ignore_eos=True,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
        )
        outputs = self._run(prompts, params, sampling.seed)
        return [
            [self._completion(len(prompt), answer) for answer in output.outputs]
            for prompt, output in zip(prompts, outputs, strict=True)
        ]

    def score(self, sequences: list[list[int]]) -> list[Scored]:
        """See `Engine`. Raises `InputError` for sequences that are too long or too short."""
        from vllm import SamplingParams

        self._check_room(sequences, 1)
        if any(len(sequence) < 2 for sequence in sequences):
            raise InputError("A sequence of one token has no log-probability.")
        params = SamplingParams(
            max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=0, prompt_logprobs=0, detokenize=False
        )
        return [
            self._scored(sequence, output)
            for sequence, output in zip(sequences, self._run(sequences, params, 0), strict=True)
        ]

    def refresh(self, folder: Path) -> None:
        """See `Engine`. Raises `InputError` unless every weight was found and has the shape of the loaded one."""
        if stored_shapes(folder) != self._shapes:
            raise InputError(f"{folder} does not hold the same weights, in name and shape, as the model that runs.")
        with _process_state(self._config.threads):
            (missing,) = self._llm.collective_rpc("refresh_weights", args=(str(folder),))
        if missing:
            raise InputError(f"{folder} lacks weights of the model the engine runs: {', '.join(missing[:3])}.")
        self._llm.reset_prefix_cache()

    def close(self) -> None:
        """Shut the engine down; memory returns to the process."""
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None

    def _run(self, prompts: list[list[int]], params: Any, seed: int) -> list[Any]:
        # What an earlier call left in the prefix cache would change the batches, and with them the last bits.
        self._llm.reset_prefix_cache()
        with _process_state(self._config.threads):
            # A per-request seed would end vLLM's CPU engine once it prefills in chunks ("CPU Generator does not
            # use offset"), so the worker's own generator is seeded.
            self._llm.collective_rpc("seed_sampling", args=(seed,))
            outputs: list[Any] = self._llm.generate(*self._requests(prompts, params), use_tqdm=False)
        return outputs

    def _further_arguments(self) -> dict[str, Any]:
        """What vLLM is told beside the config's fields."""
        return {}

    def _requests(self, prompts: list[list[int]], params: Any) -> tuple[list[Any], Any]:
        """The prompts as vLLM takes them, and the parameters of all, or of each."""
        return [{"prompt_token_ids": prompt} for prompt in prompts], params

    def _check_room(self, prompts: list[list[int]], max_tokens: int) -> None:
        longest = max(map(len, prompts), default=0)
        if longest + max_tokens > self._config.max_model_len:
            raise InputError(
                f"A prompt of {longest} tokens leaves no room for {max_tokens} more: the engine holds "
                f"{self._config.max_model_len}."
            )

    def _completion(self, prompt_length: int, answer: Any) -> Completion:
        token_ids, logprobs = list(answer.token_ids), np.array(answer.logprobs.logprobs, np.float32)
        routes = self._routes(answer.routed_experts, prompt_length + len(token_ids) - 1)
        return Completion(token_ids, logprobs, routes, answer.finish_reason)

    def _scored(self, sequence: list[int], output: Any) -> Scored:
        steps = zip(sequence[1:], output.prompt_logprobs[1:], strict=True)
        logprobs = np.array([step[token].logprob for token, step in steps], np.float32)
        return Scored(logprobs, self._routes(output.outputs[0].routed_experts, len(sequence)))

    def _routes(self, routes: Any, rows: int) -> np.ndarray | None:
        return None if self._shape is None else check_routes(routes, rows=rows, shape=self._shape)


def _check_config(folder: Path) -> None:
    """Raise `InputError` for a DeepSeek-V3 whose correction bias vLLM (0.30) would find no place for: a KeyError."""
    config = read_config(folder)
    if config["model_type"] == "deepseek_v3" and config.get("topk_method") != "noaux_tc":
        raise InputError(
            f"{folder}: config.json of a deepseek_v3 has no topk_method noaux_tc, without which vLLM does not load it.",
            hint='Add "topk_method": "noaux_tc"; transformers leaves it out of configs that it makes.',
        )


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the checkpoint's files; raises `InputError` if a file is missing."""
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        with safe_open(path, "np") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


@contextlib.contextmanager
def _model_class(folder: Path) -> Iterator[None]:
    """Give transformers its class back after vLLM has built a model on top of it.

    vLLM (0.30) decorates the class of models it has none of its own for, FlexOlmo among them, and transformers' models
    of that class cannot be made or run in this process any more. Its own does without: nothing is compiled here.
    """
    from transformers import MODEL_MAPPING, AutoConfig

    decorated = MODEL_MAPPING[type(AutoConfig.from_pretrained(folder, local_files_only=True))]
    bases, before = decorated.__bases__, dict(vars(decorated))
    try:
        yield
    finally:
        decorated.__bases__ = bases
        for name in set(vars(decorated)) - set(before):
            delattr(decorated, name)
        for name, value in before.items():
            if vars(decorated)[name] is not value:
                setattr(decorated, name, value)


@contextlib.contextmanager
def _process_state(threads: int | None) -> Iterator[None]:
    """Keep vLLM from changing what the rest of this process relies on.

    It seeds the global generators, replaces `torch.set_num_threads` by a function that does nothing, and samples from
    torch's global generator.
    """
    import random

    import torch

    set_num_threads, count = torch.set_num_threads, torch.get_num_threads()
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002  (vLLM seeds this one)
    try:
        with torch.random.fork_rng(devices=[]):
            set_num_threads(threads or count)
            yield
    finally:
        torch.set_num_threads = set_num_threads  # type: ignore[assignment,unused-ignore]
        set_num_threads(count)
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
