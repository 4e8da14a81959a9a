"""The key ring: what it keeps, what it never keeps, several processes, and a file that changes under a reader."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moestro.errors import ConfigError, InputError, MoestroError
from moestro_flows.home import Home
from moestro_services.audit import Audit
from moestro_services.cli.app import app
from moestro_services.cli.promote import actor
from moestro_services.gateway import keys as keys_module
from moestro_services.gateway.access import check_exposure, is_loopback
from moestro_services.gateway.caller import Scope
from moestro_services.gateway.keys import SECRET, Key, KeyRing
from moestro_services.gateway.limits import Limits

CREATE = """
import sys
from pathlib import Path
from moestro_services.gateway.caller import Scope
from moestro_services.gateway.keys import KeyRing
ring = KeyRing(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for at in range(25):
    ring.create(f"{sys.argv[2]}-{at}", [Scope.INFER])
"""


@pytest.fixture
def ring(tmp_path: Path) -> KeyRing:
    return KeyRing(tmp_path / "keys" / "keys.json")


def opens(ring: KeyRing, secret: str) -> Key | None:
    """The key that lets in who bears `secret`."""
    key = ring.known(secret)
    return key if key is not None and key.live else None


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_a_secret_is_kept_nowhere(ring: KeyRing, tmp_path: Path) -> None:
    key, secret = ring.create("ci", [Scope.INFER, Scope.READ])
    assert SECRET.fullmatch(secret)
    kept = everything(tmp_path)
    assert key.digest.encode() in kept
    assert secret.encode() not in kept
    assert secret[3:].encode() not in kept
    assert key.digest not in repr(key)
    assert "digest" not in key.facts()


def test_the_file_is_its_owners_alone(ring: KeyRing) -> None:
    ring.create("ci", [Scope.INFER])
    assert ring.path.stat().st_mode & 0o777 == 0o600
    assert ring.path.parent.stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in ring.path.parent.iterdir()) == ["keys.json", "keys.lock"]


def test_keys_are_found_by_their_secret_alone(ring: KeyRing) -> None:
    made = [ring.create(name, [Scope.READ]) for name in "abc"]
    for key, secret in made:
        assert opens(ring, secret) == key
        assert opens(KeyRing(ring.path), secret) == key
        assert opens(ring, key.digest) is None
        assert opens(ring, secret[:-1]) is None
    assert len({secret for _, secret in made} | {key.id for key, _ in made}) == 6
    for nothing in ("", "mk-", "\ud800", "\x00"):
        assert opens(ring, nothing) is None


def test_a_change_is_seen_at_once_by_a_ring_that_has_read_before(ring: KeyRing) -> None:
    reader = KeyRing(ring.path)
    assert reader.list() == ()
    for at in range(20):  # quicker than the clock of a file system
        key, secret = ring.create(f"k{at}", [Scope.INFER])
        assert opens(reader, secret) == key
        ring.revoke(key.id)
        known = reader.known(secret)
        assert known is not None
        assert not known.live


def test_an_unchanged_file_is_not_read_again(ring: KeyRing, monkeypatch: pytest.MonkeyPatch) -> None:
    _, secret = ring.create("ci", [Scope.INFER])
    os.utime(ring.path, ns=(1, 1))
    assert opens(ring, secret)
    monkeypatch.setattr(ring, "_read", lambda: pytest.fail("read again"))
    assert opens(ring, secret)


def test_a_removed_file_opens_nothing(ring: KeyRing) -> None:
    _, secret = ring.create("ci", [Scope.INFER])
    assert opens(ring, secret)
    ring.path.unlink()
    assert opens(ring, secret) is None


def test_all_digests_are_compared_whichever_is_the_right_one(ring: KeyRing, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = [ring.create(name, [Scope.READ])[1] for name in "abcd"]
    compared: list[bytes] = []
    real = keys_module.hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(one)
        return real(one, other)

    monkeypatch.setattr(keys_module.hmac, "compare_digest", compare)
    for secret in (*secrets, "mk-" + "x" * 43):
        compared.clear()
        ring.known(secret)
        assert len(compared) == 4


def test_processes_that_create_keys_lose_none(ring: KeyRing) -> None:
    command = [sys.executable, "-c", CREATE, str(ring.path)]
    processes = [
        subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in ("left", "right")
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    names = {key.name for key in ring.list()}
    assert names == {f"{side}-{at}" for side in ("left", "right") for at in range(25)}


def test_limits_are_kept_as_they_were_given(ring: KeyRing) -> None:
    ring.create("a", [Scope.INFER], Limits(requests_per_minute=7, tokens_per_minute=None))
    ring.create("b", [Scope.ADMIN])
    first, second = KeyRing(ring.path).list()
    assert first.limits.given() == {"requests_per_minute": 7, "tokens_per_minute": None}
    assert second.limits.given() == {}
    ring.revoke("a")
    assert KeyRing(ring.path).list()[0].limits == first.limits


def test_revoking_by_name_or_id(ring: KeyRing) -> None:
    old, _ = ring.create("ci", [Scope.INFER])
    assert ring.revoke("ci").id == old.id
    assert ring.revoke("ci") == ring.revoke(old.id)
    new, secret = ring.create("ci", [Scope.INFER])
    assert opens(ring, secret)
    assert ring.revoke("ci").id == new.id
    with pytest.raises(InputError, match="no API key 'other'") as raised:
        ring.revoke("other")
    assert "none" in raised.value.hint


@pytest.mark.parametrize("name", ["", " ", "a b", "-a", "a" * 65, "a/b", "a\n", "é", "[red]"])
def test_a_name_is_plain(ring: KeyRing, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a key's name"):
        ring.create(name, [Scope.READ])


def test_a_name_is_one_live_keys_and_a_key_opens_something(ring: KeyRing) -> None:
    ring.create("ci", [Scope.READ])
    with pytest.raises(ConfigError, match="There is a key 'ci'"):
        ring.create("ci", [Scope.READ])
    with pytest.raises(ConfigError, match="without a scope"):
        ring.create("other", [])


DAMAGED: list[Any] = [
    "",
    "{",
    "[]",
    '{"keys": [{}]}',
    '{"keys": [], "more": 1}',
    b"\xff\xfe",
    "[" * 5000,
    "null",
]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_file_is_one_clear_error_and_opens_nothing(ring: KeyRing, content: str | bytes) -> None:
    _, secret = ring.create("ci", [Scope.READ])
    assert opens(ring, secret)
    ring.path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for attempt in (ring.list, lambda: opens(ring, secret), lambda: ring.create("b", [Scope.READ])):
        for _ in range(2):
            with pytest.raises(ConfigError, match="not a readable file of API keys") as raised:
                attempt()
            assert "\n" not in raised.value.message


def test_a_field_that_is_wrong_is_named_and_twins_are_refused(ring: KeyRing) -> None:
    ring.create("ci", [Scope.READ])
    content = json.loads(ring.path.read_text())
    ring.path.write_text(json.dumps({"keys": content["keys"] * 2}))
    with pytest.raises(ConfigError, match="two keys have one id"):
        ring.list()
    content["keys"][0]["scopes"] = ["root"]
    ring.path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"keys\.0\.scopes"):
        ring.list()


def test_a_file_that_cannot_be_there_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ring = KeyRing(tmp_path / "file" / "keys.json")
    with pytest.raises(ConfigError):
        ring.create("a", [Scope.READ])
    with pytest.raises(ConfigError):
        ring.list()
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ConfigError):
        KeyRing(tmp_path / "folder.json").list()


def test_beyond_loopback_there_must_be_a_live_key(ring: KeyRing) -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        assert is_loopback(host)
        check_exposure(host, None)
        check_exposure(host, ring)
    for host in ("0.0.0.0", "::", "gateway.example", "10.0.0.1"):
        for keys, words in ((None, "have to bear a key.*Leave out --no-auth"), (ring, "no API key")):
            with pytest.raises(ConfigError, match=words):
                check_exposure(host, keys)
    ring.create("ci", [Scope.READ])
    check_exposure("0.0.0.0", ring)
    ring.revoke("ci")
    with pytest.raises(ConfigError, match="no API key"):
        check_exposure("0.0.0.0", ring)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["keys", *arguments], env={"COLUMNS": "140"})
    assert result.exception is None, result.exception
    return result.stdout


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("MOESTRO_HOME", str(tmp_path / "home"))
    return Home.current()


def test_a_script_can_take_the_key_from_standard_output(home: Home) -> None:
    found = opens(KeyRing.of(home), run("create", "ci").strip())
    assert found is not None
    assert found.name == "ci"


def test_a_key_is_created_shown_once_listed_and_revoked(home: Home) -> None:
    made = json.loads(run("create", "ci", "--scope", "infer", "--scope", "read", "--tokens-per-minute", "0", "--json"))
    assert made["scopes"] == ["read", "infer"]
    assert made["limits"] == {"tokens_per_minute": None}
    found = opens(KeyRing.of(home), made["key"])
    assert found is not None
    assert found.id == made["id"]
    listed = json.loads(run("list", "--json"))["keys"]
    assert listed == [{name: value for name, value in made.items() if name != "key"}]
    assert "tokens_per_minute none" in run("list")
    assert json.loads(run("revoke", "ci", "--json"))["revoked_at"]
    assert opens(KeyRing.of(home), made["key"]) is None
    entries = [(entry.actor, entry.action, entry.target) for entry in Audit.of(home).read(10)]
    assert entries == [(actor(), "keys.revoke", made["id"]), (actor(), "keys.create", made["id"])]
    assert made["key"].encode() not in everything(home.path)


def test_a_person_sees_the_key_as_one_word(home: Home) -> None:
    shown = run("create", "me", "--scope", "admin")
    (secret,) = [line for line in shown.splitlines() if line.startswith("mk-")]
    found = opens(KeyRing.of(home), secret)
    assert found is not None
    assert found.scopes == {Scope.ADMIN}
    assert "revoked" in run("revoke", found.id)


def test_listing_makes_no_home(home: Home) -> None:
    assert "No keys" in run("list")
    assert not home.path.exists()


def test_mistakes_are_readable(home: Home) -> None:
    for arguments in (["revoke", "nobody"], ["create", "a b"]):
        result: Any = CliRunner().invoke(app, ["keys", *arguments])
        assert isinstance(result.exception, MoestroError)
    assert CliRunner().invoke(app, ["keys", "create", "a", "--scope", "root"]).exit_code == 2
