"""What steering asks of vLLM's settings and routers, with stand-ins for vLLM's objects."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moestro.errors import InputError
from moestro.inference.steering import KNOWN_PROFILES, PROFILES_KEY, RESERVED_SALTS, cache_salt, steering_arguments
from moestro.inference.steering_routers import check_settings
from moestro.inference.weak_pass import WeakPass
from moestro.models.steering_profiles import Profile


def settings(**fields) -> SimpleNamespace:
    parallel = {"pipeline_parallel_size": 1, "data_parallel_size": 1, "use_ubatching": False}
    top = {"speculative_config": None, "kv_transfer_config": None}
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel | {key: fields.pop(key) for key in parallel if key in fields}),
        model_config=SimpleNamespace(enforce_eager=fields.pop("enforce_eager", True)),
        **top | fields,
    )


def test_plain_settings_pass():
    check_settings(settings())


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"data_parallel_size": 2}, "data parallelism"),
        ({"use_ubatching": True}, "micro-batches"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"kv_transfer_config": object()}, "a KV connector"),
        ({"enforce_eager": False}, "CUDA graphs"),
    ],
)
def test_settings_under_which_rows_move_are_refused(fields, named):
    with pytest.raises(InputError, match=named):
        check_settings(settings(**fields))


def test_servers_are_told_files_and_ids():
    arguments, environment = steering_arguments({"b": Path("/store/b"), "a": Path("/store/a")})
    assert json.loads(arguments[arguments.index("--additional-config") + 1]) == {
        PROFILES_KEY: {"a": "/store/a", "b": "/store/b"}
    }
    assert environment[KNOWN_PROFILES] == "a,b"
    assert steering_arguments({}) == ([], {})


def test_salts_are_of_one_profile_and_one_client_each():
    salts = {cache_salt(profile, own) for profile in ("a", "b") for own in ("", "x", "y")}
    assert len(salts) == 6
    assert all(salt.startswith(RESERVED_SALTS) for salt in salts)


class Runner:
    """A model runner with one attention layer and a head that doubles."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.attention = SimpleNamespace(kv_cache=torch.ones(2, 3))
        self.compilation_config = SimpleNamespace(
            static_forward_context={"attention": self.attention, "shared": self.attention, "moe": SimpleNamespace()}
        )
        self.model_config = SimpleNamespace(get_hidden_size=lambda: 4)
        self.model = SimpleNamespace(compute_logits=lambda hidden: hidden * 2)

    def get_model(self) -> SimpleNamespace:
        return self.model


def contrast_profile() -> Profile:
    return Profile.model_validate(
        {"name": "p", "method": "contrast", "checkpoint": {"stage": "rl", "fingerprint": "f"}}
        | {"layers": ((),), "num_experts": 4, "top_k": 2, "renormalises": True}
        | {"parameters": {"alpha": 1e-6, "beta": 0.5, "weak_rank": 3}}
    )


def test_the_weak_pass_has_a_cache_of_its_own():
    runner = Runner()
    weak = WeakPass(runner, {"p": contrast_profile()})
    weak.allocate()
    strong = runner.attention.kv_cache
    with weak.cache():
        assert runner.attention.kv_cache is not strong
        runner.attention.kv_cache += 7
    assert runner.attention.kv_cache is strong
    assert torch.equal(strong, torch.ones(2, 3))
    with weak.cache():
        assert torch.equal(runner.attention.kv_cache, torch.full((2, 3), 7.0))


def test_a_layer_that_keeps_something_else_is_refused():
    runner = Runner()
    runner.compilation_config.static_forward_context["mamba"] = SimpleNamespace(kv_cache=[torch.ones(1)])
    with pytest.raises(InputError, match="mamba"):
        WeakPass(runner, {"p": contrast_profile()}).allocate()


def test_logits_of_contrasted_rows_alone_are_mixed():
    runner = Runner()
    weak = WeakPass(runner, {"p": contrast_profile()})
    weak.install()
    strong, weaker = torch.randn(5, 4), torch.randn(5, 4)
    joined = weak.join(strong, weaker, {"p": torch.tensor([1, 4])})
    chosen = torch.tensor([0, 1, 4])  # what is sampled from
    mixed = runner.model.compute_logits(joined[chosen])
    assert torch.equal(mixed[0], strong[0] * 2)
    assert torch.allclose(mixed[1:], 1.5 * strong[[1, 4]] * 2 - 0.5 * weaker[[1, 4]] * 2)
    assert torch.equal(runner.model.compute_logits(strong), strong * 2)
