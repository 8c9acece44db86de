"""The file of API keys: who may come in with which, by the SHA-256 of each.

A key is ``ap_<id>_<secret>``, the secret 256 random bits in base64. It is shown once and kept
nowhere: what 256 random bits hash to cannot be searched for, so no slow hash is needed.

Changes are made under a lock, and the file is replaced as a whole: whoever reads it sees the keys
of before or of after, and two who change it at once both succeed. It stays its owner's, whoever changes it.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from app.domain.errors import InvalidInput
from app.domain.ids import parse_name

SECRET_BYTES = 32
FILE_MODE = 0o600
KEY = re.compile(rb"ap_([0-9a-f]{16})_[A-Za-z0-9_-]{43}")

Scope = Literal["user", "admin"]


def _user_id(text: str) -> str:
    try:
        return parse_name(text, "user_id")
    except InvalidInput as error:
        raise ValueError(error.message) from None


class ApiKey(BaseModel):
    """What is kept of one key. ``expires_at`` ``None``: never; ``revoked`` is for good."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    id: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    user_id: Annotated[str, AfterValidator(_user_id)]
    scope: Scope = "user"
    label: Annotated[str, Field(max_length=200)] | None = None
    created_at: AwareDatetime
    expires_at: AwareDatetime | None = None
    revoked: bool = False


class KeyList(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    version: Literal[1] = 1
    keys: tuple[ApiKey, ...] = ()

    @model_validator(mode="after")
    def _check_ids(self) -> Self:
        if len({key.id for key in self.keys}) < len(self.keys):
            raise ValueError("two keys have the same id")
        return self


def parse_keys(raw: bytes) -> tuple[ApiKey, ...]:
    """Return the keys in the contents of a file.

    Raises:
        ValueError: it is not such a file; says in one line where.
    """
    try:
        return KeyList.model_validate_json(raw).keys
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(step) for step in first["loc"])
        raise ValueError(f"not a file of keys: {where + ': ' if where else ''}{first['msg']}") from None


class KeyFile:
    """The keys in one file, for those who change them. It need not exist yet."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def list(self) -> tuple[ApiKey, ...]:
        """Return all keys, oldest first, revoked ones too.

        Raises:
            ValueError, OSError: they cannot be read.
        """
        try:
            return parse_keys(self._path.read_bytes())
        except FileNotFoundError:
            return ()
        except ValueError as error:
            raise ValueError(f"API_KEYS_FILE: {self._path}: {error}") from None

    def create(
        self, user_id: str, scope: Scope, label: str | None, now: datetime, expires_at: datetime | None
    ) -> tuple[ApiKey, str]:
        """Add a key; return what is kept of it, and the key itself.

        Raises:
            ValueError, OSError: the file is broken or cannot be changed.
        """
        key_id = secrets.token_hex(8)
        text = f"ap_{key_id}_{secrets.token_urlsafe(SECRET_BYTES)}"
        key = ApiKey(
            id=key_id,
            sha256=hashlib.sha256(text.encode()).hexdigest(),
            user_id=user_id,
            scope=scope,
            label=label,
            created_at=now,
            expires_at=expires_at,
        )
        with self._locked():
            self._replace((*self.list(), key))
        return key, text

    def revoke(self, key_id: str) -> ApiKey | None:
        """Have a key count no more, from within a second on; return it, ``None`` if there is none.

        Raises:
            ValueError, OSError: the file is broken or cannot be changed.
        """
        with self._locked():
            keys = self.list()
            found = next((key for key in keys if key.id == key_id), None)
            if found is not None and not found.revoked:
                found = found.model_copy(update={"revoked": True})
                self._replace(tuple(found if key.id == key_id else key for key in keys))
        return found

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        # A file of its own: a lock on one that is replaced would keep nobody out.
        descriptor = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT, FILE_MODE)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _replace(self, keys: tuple[ApiKey, ...]) -> None:
        path = self._path.resolve()  # through a link, to the file
        fresh = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE)
        try:
            with open(descriptor, "wb") as file:
                _take_after(path, descriptor)
                file.write(KeyList(keys=keys).model_dump_json(indent=2).encode() + b"\n")
                file.flush()
                os.fsync(descriptor)
            os.replace(fresh, path)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def _take_after(path: Path, descriptor: int) -> None:
    """Give the file that will replace ``path`` its owner, group and mode.

    A server that could not read it any more would go on letting in by the keys that it has read.
    """
    try:
        before = os.stat(path)
    except FileNotFoundError:
        return
    try:
        os.fchown(descriptor, before.st_uid, before.st_gid)
    except PermissionError as error:
        raise PermissionError(
            error.errno,
            "only its owner, or root, can change it so that its owner still can read it",
            str(path),
        ) from None
    os.fchmod(descriptor, stat.S_IMODE(before.st_mode))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_alive(key: ApiKey, now: datetime) -> bool:
    """Whether the key counts now."""
    return not key.revoked and (key.expires_at is None or now < key.expires_at)


def from_ms(ms: int) -> datetime:
    """Return the time that is so many milliseconds after the epoch."""
    return datetime.fromtimestamp(ms / 1000, UTC)
