"""Steering inside vLLM's worker: routers that treat rows of a batch by the profile of their request.

vLLM flattens a step's requests into one batch of tokens, whole prompts, chunks of them and single tokens after one
another. `SteeredRouters` notes, when a step's inputs are prepared, which rows belong to which profile, and wraps
`_compute_routing` of every router: all rows are routed as ever, then those of a profile once more by its rule, the
router itself doing the softmax and the choice. A step without steered requests takes no other path than before.

Contrast needs a second pass through weak experts, with keys and values of its own. It runs over the same batch, with
the same block tables, on a second KV cache (`WeakPass`): so each block, cached prefixes included, holds both passes.

T tokens of a step, E experts, K chosen per token, D hidden.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moestro.errors import InputError
from moestro.inference.steering import PROFILE_ARGUMENT
from moestro.inference.weak_pass import WeakPass
from moestro.models.steering_profiles import Method, Profile
from moestro.models.steering_rules import Choice, Steer, check_fits, layer_rules


class SteeredRouters:
    """The profiles of one worker, and which rows of the present step follow which."""

    def __init__(self, model_runner: Any, profiles: Mapping[str, Profile]) -> None:
        """`profiles` by the id that requests give. Nothing is changed before `install`."""
        self._runner = model_runner
        self._profiles = dict(profiles)
        self._rules = {name: layer_rules(profile) for name, profile in profiles.items()}
        self._step: dict[str, Tensor] = {}
        self._active: dict[str, Tensor] = {}
        contrasts = {name: profile for name, profile in profiles.items() if profile.method == Method.CONTRAST}
        self._weak = WeakPass(model_runner, contrasts) if contrasts else None

    def install(self) -> None:
        """Wrap the routers and the model runner; raises `InputError` if a profile does not fit the model."""
        layers = _moe_layers(self._runner.get_model())
        for profile in self._profiles.values():
            check_fits(
                profile,
                layers=len(layers),
                num_experts=layers[0].router.global_num_experts,
                top_k=layers[0].router.top_k,
            )
            if profile.renormalises != layers[0].router.renormalize:
                raise InputError(f"Steering profile {profile.name!r} is for routers that renormalise otherwise.")
        for number, layer in enumerate(layers):
            layer.router._compute_routing = self._steered(number, layer.router._compute_routing)
        self._runner._prepare_inputs = self._noting_rows(self._runner._prepare_inputs)
        self._runner._model_forward = self._in_passes(self._runner._model_forward)
        if self._weak:
            self._weak.install()

    def allocate_weak_cache(self) -> None:
        """Allocate what contrast needs beside the KV cache, which must exist."""
        if self._weak:
            self._weak.allocate()

    def _noting_rows(self, prepare: Callable[..., Any]) -> Callable[..., Any]:
        def run(scheduler_output: Any, num_scheduled_tokens: np.ndarray) -> Any:
            prepared = prepare(scheduler_output, num_scheduled_tokens)
            self._step = self._rows_by_profile(num_scheduled_tokens)
            return prepared

        return run

    def _rows_by_profile(self, num_scheduled_tokens: np.ndarray) -> dict[str, Tensor]:
        """Rows of the batch, in its final order, by profile."""
        wanted = [self._wanted(request) for request in self._runner.input_batch.req_ids]
        ends = np.cumsum(num_scheduled_tokens)
        rows: dict[str, list[np.ndarray]] = {}
        for profile, end, count in zip(wanted, ends, num_scheduled_tokens, strict=True):
            if profile is not None:
                rows.setdefault(profile, []).append(np.arange(end - count, end))
        return {name: torch.from_numpy(np.concatenate(parts)).to(self._runner.device) for name, parts in rows.items()}

    def _wanted(self, request: str) -> str | None:
        params = self._runner.requests[request].sampling_params
        profile: str | None = ((params.extra_args if params else None) or {}).get(PROFILE_ARGUMENT)
        if profile is not None and profile not in self._profiles:
            raise RuntimeError(f"request {request} names the unknown steering profile {profile!r}")
        return profile

    def _in_passes(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(**inputs: Any) -> Any:
            step, self._step = self._step, {}
            contrasted = {name: rows for name, rows in step.items() if self._weak and name in self._weak.profiles}
            weak = None
            if self._weak and contrasted:
                # First: what routers report of a step is then of the strong pass.
                with self._following(contrasted), self._weak.cache():
                    weak = forward(**inputs)
            with self._following({name: rows for name, rows in step.items() if name not in contrasted}):
                hidden_TD = forward(**inputs)
            return hidden_TD if weak is None or not self._weak else self._weak.join(hidden_TD, weak, contrasted)

        return run

    @contextmanager
    def _following(self, rows: dict[str, Tensor]) -> Iterator[None]:
        self._active = rows
        try:
            yield
        finally:
            self._active = {}

    def _steered(self, layer: int, compute: Callable[..., Choice]) -> Callable[..., Choice]:
        def run(
            hidden_states: Tensor, router_logits: Tensor, indices_type: Any, *, input_ids: Tensor | None = None
        ) -> Choice:
            gates_TK, ids_TK = compute(hidden_states, router_logits, indices_type, input_ids=input_ids)
            for name, rows in self._active.items():
                rule = self._rules[name][layer]
                if rule:
                    part = _Rows(compute, hidden_states, indices_type, input_ids, rows)
                    gates, ids = part.choose(rule, router_logits)
                    gates_TK.index_copy_(0, rows, gates.to(gates_TK.dtype))
                    ids_TK.index_copy_(0, rows, ids.to(ids_TK.dtype))
            return gates_TK, ids_TK

        return run


class _Rows:
    """Some rows of a batch before one router."""

    def __init__(
        self, compute: Callable[..., Choice], hidden: Tensor, kind: Any, tokens: Tensor | None, rows: Tensor
    ) -> None:
        self._compute, self._kind, self._rows = compute, kind, rows
        self._hidden = hidden.index_select(0, rows)
        self._tokens = None if tokens is None else tokens.index_select(0, rows)

    def choose(self, rule: Steer, logits_TE: Tensor) -> Choice:
        """What the rule makes of the rows' logits."""
        return rule(logits_TE.index_select(0, self._rows), self._route)

    def _route(self, logits_RE: Tensor) -> Choice:
        return self._compute(self._hidden, logits_RE.contiguous(), self._kind, input_ids=self._tokens)


def check_settings(config: Any) -> None:
    """Raise `InputError` for a vLLM config under which rows of a batch are not what a model runner's step says."""
    parallel = config.parallel_config
    refused = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "data parallelism": parallel.data_parallel_size > 1,
        "micro-batches": parallel.use_ubatching,
        "speculative decoding": config.speculative_config is not None,
        "a KV connector": config.kv_transfer_config is not None,
        "CUDA graphs and compilation": not config.model_config.enforce_eager,
    }
    if found := [what for what, there in refused.items() if there]:
        raise InputError(f"Steering profiles cannot be served with {', '.join(found)}.")


def _moe_layers(model: Any) -> list[Any]:
    """vLLM's sparse layers in order; raises `InputError` unless their routers are softmax routers in its hands."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner_interface import MoERunnerInterface

    layers: list[Any] = [module for module in model.modules() if isinstance(module, MoERunnerInterface)]
    if not layers:
        raise InputError("The served model has no routers to steer.")
    for layer in layers:
        router = layer.router
        settings = {
            "use_grouped_topk": False,
            "custom_routing_function": None,
            "e_score_correction_bias": None,
            "scoring_func": "softmax",
        }
        plain = all(getattr(router, name, value) == value for name, value in settings.items())
        known = type(router).__name__ in ("CPURouter", "FusedTopKRouter")
        if not (plain and known) or layer._quant_method.is_monolithic:
            raise InputError(
                f"Steering knows no way into the router of {layer.layer_name} ({type(router).__name__}).",
                hint="Softmax routers that choose the K largest can be steered.",
            )
    return layers
