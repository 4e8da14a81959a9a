"""Steering profiles at the gateway: who may name one, what the request becomes, and what servers are told."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from moestro.artifacts import ArtifactStore, Input, Record, digest_files
from moestro.inference.steering import KNOWN_PROFILES, PROFILES_KEY
from moestro.models.steering_profiles import Profile
from moestro_services.gateway.caller import Caller, Scope
from moestro_services.gateway.deployments import Deployment
from moestro_services.gateway.errors import Refused
from moestro_services.gateway.steering import Steering

ADMIN = Caller("boss", frozenset({Scope.ADMIN}))
USER = Caller("user", frozenset({Scope.INFER, Scope.READ}))
PROFILE = {
    "method": "suppress",
    "layers": ((1,),),
    "num_experts": 4,
    "top_k": 2,
    "renormalises": True,
    "parameters": {},
}
CHECKPOINT, OTHER = "c" * 64, "d" * 64


def deployment(checkpoint: str = CHECKPOINT, fingerprint: str = "e" * 64) -> Deployment:
    made = Input(stage="rl", fingerprint=checkpoint)
    return Deployment("assistant", "3", fingerprint, made, "float32", 512, 0)


def publish(store: ArtifactStore, name: str, fingerprint: str, checkpoint: str = CHECKPOINT, minute: int = 0) -> Path:
    folder = store.folder("steer", fingerprint)
    folder.mkdir(parents=True)
    Profile.model_validate(PROFILE | {"name": name, "checkpoint": {"stage": "rl", "fingerprint": checkpoint}}).write(
        folder
    )
    record = Record(
        stage="steer",
        version="1",
        fingerprint=fingerprint,
        inputs={"model": Input(stage="rl", fingerprint=checkpoint)},
        config={"name": name},
        result={},
        files=digest_files(folder),
        code_version="test",
        created_at=datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=minute),
        seconds=1.0,
    )
    (folder / "artifact.json").write_text(record.model_dump_json())
    return folder


@pytest.fixture
def store(tmp_path):
    store = ArtifactStore(tmp_path)
    publish(store, "calm", "1a" * 32)
    publish(store, "calm", "1b" * 32, minute=5)
    publish(store, "german", "2a" * 32, minute=1)
    publish(store, "foreign", "3a" * 32, checkpoint=OTHER)
    return store


@pytest.fixture
def steering(store):
    steering = Steering(store)
    steering.server_arguments(deployment())
    return steering


def refused(steering: Steering, caller: Caller = ADMIN, of: Deployment | None = None, **body) -> Refused:
    with pytest.raises(Refused) as error:
        steering.prepare(caller, of or deployment(), {"model": "assistant", "prompt": "hi"} | body)
    return error.value


def test_a_server_knows_the_profiles_of_its_checkpoint_and_no_others(store):
    arguments, environment = Steering(store).server_arguments(deployment())
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    files = json.loads(options["--additional-config"])[PROFILES_KEY]
    assert set(files) == {"1a" * 32, "1b" * 32, "2a" * 32}
    assert all((Path(path) / "steering.json").is_file() for path in files.values())
    assert environment[KNOWN_PROFILES].split(",") == sorted(files)


def test_a_server_without_profiles_is_started_as_ever(store):
    assert Steering(store).server_arguments(deployment("9" * 64)) == ([], {})


def test_a_profile_that_is_not_what_was_published_is_left_out(store, caplog):
    (store.folder("steer", "2a" * 32) / "steering.json").write_text("{ }")
    steering = Steering(store)
    _, environment = steering.server_arguments(deployment())
    assert environment[KNOWN_PROFILES].split(",") == ["1a" * 32, "1b" * 32]
    assert "german is left out" in caplog.text
    assert refused(steering, steering_profile="german").status == 409


def test_requests_without_a_profile_pass_as_they_are(steering):
    body = {"model": "assistant", "vllm_xargs": {"own": 1}, "cache_salt": "tenant"}
    for caller in (ADMIN, USER):
        assert steering.prepare(caller, deployment(), body) is body


@pytest.mark.parametrize(
    ("reference", "meant"),
    [("german", "2a" * 32), ("calm", "1b" * 32), ("1a1a1a1a", "1a" * 32), ("1b" * 32, "1b" * 32)],
)
def test_a_profile_becomes_an_argument_and_a_salt(steering, reference, meant):
    body = {"model": "assistant", "prompt": "hi", "steering_profile": reference}
    sent = steering.prepare(ADMIN, deployment(), body)
    assert sent == {
        "model": "assistant",
        "prompt": "hi",
        "vllm_xargs": {"moestro_profile": meant},
        "cache_salt": f"moestro-steering:{meant}:",
    }
    assert body == {"model": "assistant", "prompt": "hi", "steering_profile": reference}


def test_what_the_client_had_of_its_own_stays(steering):
    body = {"model": "m", "steering_profile": "german", "vllm_xargs": {"own": 1}, "cache_salt": "tenant"}
    sent = steering.prepare(ADMIN, deployment(), body)
    assert sent["vllm_xargs"] == {"own": 1, "moestro_profile": "2a" * 32}
    assert sent["cache_salt"] == f"moestro-steering:{'2a' * 32}:tenant"
    assert body["vllm_xargs"] == {"own": 1}


def test_only_admins_may_steer(steering):
    assert refused(steering, USER, steering_profile="german").status == 403
    assert refused(steering, USER, steering_profile="nothing").status == 403


@pytest.mark.parametrize("reference", ["nothing", "1a1a1a1", "../../etc", "GERMAN"])
def test_unknown_profiles_are_not_found(steering, reference):
    error = refused(steering, steering_profile=reference)
    assert (error.status, error.code) == (404, "profile_not_found")


def test_a_profile_of_another_checkpoint_is_refused(steering):
    error = refused(steering, steering_profile="foreign")
    assert error.status == 400
    assert "another checkpoint than assistant@3" in error.message


def test_a_profile_that_the_running_server_has_not_read_is_refused_until_it_has(store, steering):
    publish(store, "fresh", "4a" * 32, minute=9)
    assert refused(steering, steering_profile="fresh").status == 409
    steering.server_arguments(deployment())
    assert steering.prepare(ADMIN, deployment(), {"model": "m", "steering_profile": "fresh"})["vllm_xargs"]


def test_a_prefix_of_several_fingerprints_is_refused(store):
    publish(store, "twin", "1a" * 5 + "ff" * 27, minute=2)
    steering = Steering(store)
    steering.server_arguments(deployment())
    assert "several" in refused(steering, steering_profile="1a1a1a1a").message


@pytest.mark.parametrize(
    "body",
    [
        {"vllm_xargs": {"moestro_profile": "2a" * 32}},
        {"vllm_xargs": {"moestro_other": 1}},
        {"cache_salt": f"moestro-steering:{'2a' * 32}:"},
        {"steering_profile": 7},
        {"steering_profile": ""},
        {"steering_profile": None},
        {"steering_profile": "german", "vllm_xargs": ["x"]},
        {"steering_profile": "german", "cache_salt": ""},
        {"steering_profile": "german", "use_beam_search": True},
    ],
)
def test_what_would_get_past_the_hook_is_refused(steering, body):
    assert refused(steering, ADMIN, **body).status == 400
    if "steering_profile" not in body:
        assert refused(steering, USER, **body).status == 400
