"""``agentpool keys``: what it makes, lists and revokes, and what it refuses in one line."""

import json
from pathlib import Path

import pytest

from app.domain.errors import StoreUnavailable
from app.domain.principal import Principal
from app.identity.api_keys import ApiKeys
from app.identity.key_commands import MAX_DAYS, KeyCommands, WrongUsage
from tests.fakes import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def commands(tmp_path: Path, clock: FakeClock) -> KeyCommands:
    return KeyCommands(str(tmp_path / "keys.json"), str(tmp_path / "audit"), clock)


def enter(folder: Path, clock: FakeClock, text: str) -> Principal:
    return ApiKeys(str(folder / "keys.json"), clock).authenticate([(b"x-api-key", text.encode())])


def test_a_key_is_made_for_a_user(tmp_path: Path, commands: KeyCommands, clock: FakeClock) -> None:
    """With its scope; it lets in at once."""
    _, text = commands.create("alice", "admin", "laptop", 30)
    assert enter(tmp_path, clock, text).user_id == "alice"
    assert enter(tmp_path, clock, text).is_admin


def test_a_list_tells_which_keys_count(commands: KeyCommands, clock: FakeClock) -> None:
    """One line each, and never a key or what it hashes to."""
    made = [commands.create("alice", "user", "a phone", 1), commands.create("bob", "admin", None, None)]
    made.append(commands.create("carol", "user", None, None))
    commands.revoke(made[2][0].id)
    first, second, third = (key.id for key, _ in made)
    assert list(commands.lines()) == [
        f"{first}  alice  user  until 2027-01-16 08:00Z  a phone",
        f"{second}  bob  admin  for ever",
        f"{third}  carol  user  revoked",
    ]
    clock.advance(86_400)
    assert "  expired  " in next(iter(commands.lines()))


@pytest.mark.parametrize(
    ("user", "scope", "label", "days", "named"),
    [
        ("", "user", None, None, "--user"),
        ("a/b", "user", None, None, "--user"),
        ("..", "user", None, None, "--user"),
        ("a" * 129, "user", None, None, "--user"),
        ("alice", "root", None, None, "--scope"),
        ("alice", "", None, None, "--scope"),
        ("alice", "user", "x" * 201, None, "--label"),
        ("alice", "user", None, 0, "--expires-days"),
        ("alice", "user", None, MAX_DAYS + 1, "--expires-days"),
    ],
)
def test_what_cannot_be_made_is_refused(
    tmp_path: Path,
    commands: KeyCommands,
    user: str,
    scope: str,
    label: str | None,
    days: int | None,
    named: str,
) -> None:
    """In one line that names the option; nothing is written."""
    with pytest.raises(WrongUsage, match=f"^{named}: ") as refusal:
        commands.create(user, scope, label, days)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "keys.json").exists()


def test_what_is_not_there_cannot_be_revoked(commands: KeyCommands) -> None:
    """Nor a key by itself, whose id alone is its name; twice does no harm."""
    key, text = commands.create("alice", "user", None, None)
    for name in ("", "0" * 16, text):
        with pytest.raises(WrongUsage):
            commands.revoke(name)
    commands.revoke(key.id)
    commands.revoke(key.id)
    assert next(iter(commands.lines())).endswith("revoked")


def test_a_broken_file_is_left_alone(tmp_path: Path, commands: KeyCommands) -> None:
    """It is named, and not replaced by one with a single key."""
    (tmp_path / "keys.json").write_text("{")
    for change in (lambda: commands.create("alice", "user", None, None), lambda: commands.revoke("0" * 16)):
        with pytest.raises(ValueError, match=r"^API_KEYS_FILE: "):
            change()
    assert (tmp_path / "keys.json").read_text() == "{"


def test_changes_are_in_the_audit_log(tmp_path: Path, commands: KeyCommands) -> None:
    """Which key of whom, by whom on this machine; not the key."""
    key, text = commands.create("alice", "admin", None, None)
    commands.revoke(key.id)
    told = [json.loads(line) for line in (tmp_path / "audit").read_text().splitlines()]
    assert [(line["action"], line["owner"], line["path"]) for line in told] == [
        ("agentpool keys create", "alice", f"key:{key.id} admin"),
        ("agentpool keys revoke", "alice", f"key:{key.id} admin"),
    ]
    assert all(line["credential"] == "command line" and line["user_id"] for line in told)
    assert text[20:] not in (tmp_path / "audit").read_text()


def test_what_cannot_be_noted_is_not_done(tmp_path: Path, commands: KeyCommands) -> None:
    """No key is made while the audit log is out of reach."""
    (tmp_path / "audit").unlink()
    (tmp_path / "audit").mkdir()
    with pytest.raises(StoreUnavailable):
        commands.create("alice", "user", None, None)
    assert not (tmp_path / "keys.json").exists()
