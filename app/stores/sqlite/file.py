"""The database file: who may open it, how a connection is set up, which schema it has.

One process at a time: an ``flock`` on ``<db>.lock`` is held from before the first
connection until after the last is closed. The lock file itself is never removed,
since a second process may hold it open already.
"""

import fcntl
import os
import re
from importlib.resources import files
from threading import Event

import apsw

from app.domain.errors import StoreLocked, StoreUnavailable
from app.stores.sqlite.connection import Connection

APPLICATION_ID = 0x41675031  # "AgP1", in the file's header
BUSY_TIMEOUT_MS = 1000
CACHE_KIB = 8192
LOCK_POLL_S = 0.1
WAL_LIMIT_BYTES = 64 * 1024 * 1024
MIN_FREE_BYTES = 8 * 1024 * 1024
"""Room for the largest answer (``MODEL_MAX_BYTES``, 4 MiB): in the WAL, and in the database."""
NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb2", "smb3", "smbfs", "ncpfs", "afs", "ceph", "lustre"}
    | {"fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.rclone", "fuse.smbnetfs"}
)

_ESCAPED = re.compile(r"\\([0-7]{3})")  # how /proc/mounts writes a space: \040


def resolve(path: str) -> str:
    """Return the real path of the database, so that every name of the file means one lock.

    Raises:
        StoreUnavailable: it is no path, its directory is missing, or it is on a network file system.
    """
    if path in {"", ":memory:"} or path.startswith("file:"):
        raise StoreUnavailable("SQLite needs the path of a file; use memory:// to keep nothing.")
    real = os.path.realpath(path)
    directory = os.path.dirname(real)
    if not os.path.isdir(directory):
        raise StoreUnavailable(f"The database's directory {directory} does not exist.")
    if os.path.isdir(real):
        raise StoreUnavailable(f"The database {real} is a directory.")
    if (kind := network_file_system(directory, _mounts())) is not None:
        raise StoreUnavailable(
            f"The database's directory {directory} is on a network file system ({kind}), "
            "where SQLite loses data; use a local disk."
        )
    return real


def network_file_system(directory: str, mounts: str) -> str | None:
    """Return the kind of network file system that ``directory`` is on, by the text of /proc/mounts."""
    best, kind = "", ""
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = _ESCAPED.sub(lambda octal: chr(int(octal[1], 8)), fields[1])
        inside = directory == point or directory.startswith(point.rstrip("/") + "/")
        # ">=": of two mounts on one point the later hides the earlier.
        if inside and len(point) >= len(best):
            best, kind = point, fields[2]
    return kind if kind in NETWORK_FILE_SYSTEMS else None


def has_room(directory: str) -> bool:
    """Say whether the file system of ``directory`` has room for a turn; asks the kernel, not the disk."""
    try:
        found = os.statvfs(directory)
    except OSError:
        return True  # it cannot tell: the write will
    # A file system that does not count its blocks shows none.
    return found.f_blocks == 0 or found.f_bavail * found.f_frsize >= MIN_FREE_BYTES


def take_lock(path: str, *, wait: bool, given_up: Event) -> int:
    """Take the lock of the database ``path`` and return its descriptor; closing that releases it.

    With ``wait`` it asks again until it is free or ``given_up`` is set. It polls
    because a thread that blocks in ``flock`` could not be stopped.

    Raises:
        StoreLocked: another process has it.
    """
    try:
        lock = os.open(path + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreUnavailable(f"The lock file {path}.lock cannot be opened: {error.strerror}.") from error
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if not wait or given_up.wait(LOCK_POLL_S):
                    raise StoreLocked(_locked_by(path, lock)) from error
            else:
                _sign(lock)
                return lock
    except BaseException:
        os.close(lock)
        raise


def connect(path: str) -> Connection:
    """Return the connection that writes, in WAL mode with every commit synced.

    Raises:
        apsw.Error
    """
    # Conversations are nobody else's business; SQLite gives its -wal and -shm the same mode.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    connection = Connection(path, flags=apsw.SQLITE_OPEN_READWRITE)
    connection.set_busy_timeout(BUSY_TIMEOUT_MS)
    # A new file gets its WAL mode under a rollback journal. "extra" syncs that journal's
    # removal; with "full" a power cut could bring it back, and it would undo everything.
    connection.pragma("synchronous", "extra")
    if connection.pragma("journal_mode", "wal") != "wal":
        connection.close()
        raise apsw.CantOpenError("the file system does not support WAL")
    connection.pragma("synchronous", "full")
    connection.pragma("journal_size_limit", WAL_LIMIT_BYTES)
    # What is deleted is overwritten with zeros. Else an erasure would leave it in free pages, from which
    # it could be undeleted. Copies that a split of pages left in their free space are not found by it.
    connection.pragma("secure_delete", True)
    _tune(connection)
    return connection


def connect_reader(path: str) -> Connection:
    """Return a connection that cannot write.

    Raises:
        apsw.Error
    """
    connection = Connection(path, flags=apsw.SQLITE_OPEN_READONLY)
    connection.set_busy_timeout(BUSY_TIMEOUT_MS)
    connection.pragma("query_only", True)
    _tune(connection)
    return connection


def rebuild(path: str) -> None:
    """Write the database anew without its free parts, and empty the WAL.

    Raises:
        apsw.Error
    """
    connection = connect(path)
    try:
        connection.pragma("temp_store", "file")  # the whole database may be more than fits in memory
        connection.execute("VACUUM")
        connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    finally:
        connection.close()


def migrate(connection: Connection) -> None:
    """Bring the schema to the newest version, in one transaction.

    Raises:
        StoreUnavailable: the file is not ours, or a newer version of the program wrote it.
        apsw.Error
    """
    steps = migrations()
    version = connection.pragma("user_version")
    if version > len(steps):
        raise StoreUnavailable(
            f"The database has schema {version}, but this version knows only {len(steps)}: "
            "a newer version has written it."
        )
    owner = connection.pragma("application_id")
    is_empty = not connection.execute("SELECT 1 FROM sqlite_schema LIMIT 1").get
    if owner != APPLICATION_ID and not (owner == 0 and version == 0 and is_empty):
        raise StoreUnavailable("The database file belongs to another program.")
    if version == len(steps):
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        for step in steps[version:]:
            connection.execute(step)
        connection.pragma("application_id", APPLICATION_ID)
        connection.pragma("user_version", len(steps))
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def migrations() -> list[str]:
    """Return the SQL of every schema step; the n-th leads to version n."""
    folder = files("app.stores").joinpath("sql", "sqlite")
    steps = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".sql")), key=lambda e: e.name)
    return [step.read_text(encoding="utf-8") for step in steps]


def unavailable(error: BaseException, *, outcome_unknown: bool = False) -> StoreUnavailable:
    """Translate what SQLite or the file system raised."""
    match error:
        case apsw.FullError():
            detail = "The database is full."
        case apsw.BusyError() | apsw.LockedError():
            detail = "The database is locked by another program."
        case apsw.CorruptError() | apsw.NotADBError():
            detail = "The database file is damaged."
        case apsw.CantOpenError() | apsw.ReadOnlyError() | apsw.PermissionsError():
            detail = "The database cannot be opened or written."
        case apsw.IOError() | OSError():
            detail = "The database cannot be read or written: the disk reports an error."
        case _:
            detail = f"The database failed ({type(error).__name__})."
    return StoreUnavailable(detail, outcome_unknown=outcome_unknown)


def _tune(connection: Connection) -> None:
    connection.pragma("cache_size", -CACHE_KIB)
    connection.pragma("temp_store", "memory")
    connection.pragma("trusted_schema", False)


def _mounts() -> str:
    try:
        with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:  # not Linux: nothing to ask
        return ""


def _sign(lock: int) -> None:
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)


def _locked_by(path: str, lock: int) -> str:
    holder = os.pread(lock, 32, 0).decode(errors="replace").strip()
    who = f"process {holder}" if holder.isdigit() else "another process"
    return f"The database {path} is in use by {who}."
