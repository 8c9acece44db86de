"""What ``agentpool keys`` does: change the file of keys, and have that in the audit log."""

import os
import pwd
from collections.abc import Iterator
from datetime import timedelta

from pydantic import ValidationError

from app.domain.audit import AuditRecord
from app.identity.audit import open_audit
from app.identity.key_file import ApiKey, KeyFile, Scope, from_ms, is_alive
from app.ports import Clock

MAX_DAYS = 36_500
SCOPES: dict[str, Scope] = {"user": "user", "admin": "admin"}


class WrongUsage(Exception):
    """It was asked for something that there is not; says what in one line."""


class KeyCommands:
    """Changes the keys in one file.

    Raises:
        ValueError: the audit log cannot be opened; names the setting. Later: the file is broken.
        OSError: later: the file cannot be read or changed.
        StoreUnavailable: later: the audit log cannot be written, and nothing has changed.
    """

    def __init__(self, path: str, audit_path: str | None, clock: Clock) -> None:
        self._file = KeyFile(path)
        self._audit = open_audit(audit_path, clock)
        self._clock = clock

    def create(
        self, user_id: str, scope: str, label: str | None, expires_days: int | None
    ) -> tuple[ApiKey, str]:
        """Add a key for a user; return what is kept of it, and the key itself.

        Raises:
            WrongUsage
        """
        if not user_id:
            raise WrongUsage("--user: name the user whom the key is for")
        if (known := SCOPES.get(scope)) is None:
            raise WrongUsage(f"--scope: must be {' or '.join(SCOPES)}")
        if expires_days is not None and not 1 <= expires_days <= MAX_DAYS:
            raise WrongUsage(f"--expires-days: must be 1 to {MAX_DAYS}")
        now = from_ms(self._clock.now_ms())
        expires_at = None if expires_days is None else now + timedelta(days=expires_days)
        self._audit.require()
        try:
            made, text = self._file.create(user_id, known, label, now, expires_at)
        except ValidationError as error:
            wrong = error.errors(include_input=False, include_url=False)[0]
            name = {"user_id": "--user", "label": "--label"}.get(str(wrong["loc"][0]), str(wrong["loc"][0]))
            raise WrongUsage(f"{name}: {wrong['msg'].removeprefix('Value error, ')}") from None
        self._note("create", made)
        return made, text

    def revoke(self, key_id: str) -> None:
        """Have a key count no more.

        Raises:
            WrongUsage: there is none of that id.
        """
        self._audit.require()
        if (revoked := self._file.revoke(key_id)) is None:
            raise WrongUsage("there is no key of that id")
        self._note("revoke", revoked)

    def lines(self) -> Iterator[str]:
        """Yield what there is to know of each key, oldest first."""
        now = from_ms(self._clock.now_ms())
        for key in self._file.list():
            until = "for ever" if key.expires_at is None else f"until {key.expires_at:%Y-%m-%d %H:%M}Z"
            counts = until if is_alive(key, now) else "revoked" if key.revoked else "expired"
            yield f"{key.id}  {key.user_id}  {key.scope}  {counts}  {key.label or ''}".rstrip()

    def _note(self, done: str, key: ApiKey) -> None:
        self._audit.write(
            AuditRecord(
                credential="command line",
                user_id=_login_name(),
                action=f"agentpool keys {done}",
                path=f"key:{key.id} {key.scope}",
                owner=key.user_id,
            )
        )


def _login_name() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container's user has a number only
        return str(os.getuid())
