"""The command line: serve, the keys of clients, and what is done to a store while nobody serves."""

import signal

# Until the server takes the signals over, each simply ends the process: nothing has begun.
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import asyncio
import contextlib
import ipaddress
import socket
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from pydantic import ValidationError

from app.config import Settings
from app.domain.errors import AgentPoolError

if TYPE_CHECKING:
    from app.identity.key_commands import KeyCommands

cli = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None
)


@cli.callback()
def root() -> None:
    """An agent session server: every conversation gets its own live agent."""


@cli.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on [HOST].")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one [PORT].")] = None,
    store_url: Annotated[str | None, typer.Option(help="Where sessions are stored [STORE_URL].")] = None,
    model_provider: Annotated[str | None, typer.Option(help="Who answers [MODEL_PROVIDER].")] = None,
    model_name: Annotated[str | None, typer.Option(help="Which model answers [MODEL_NAME].")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning, error [LOG_LEVEL].")] = None,
    log_format: Annotated[str | None, typer.Option(help="console or json [LOG_FORMAT].")] = None,
    insecure: Annotated[
        bool, typer.Option(help="Listen beyond this machine without authentication.")
    ] = False,
    accept_volatile: Annotated[
        bool, typer.Option(help="Serve although the store may lose what it acknowledged [ACCEPT_VOLATILE].")
    ] = False,
    wait_for_store: Annotated[bool, typer.Option(help="Wait while another process has the store.")] = False,
    workers: Annotated[
        int, typer.Option(min=1, max=256, help="Processes that serve; the store must be one they can share.")
    ] = 1,
    fd: Annotated[
        int | None,
        typer.Option(min=0, help="Listen on this inherited socket; HOST and PORT do not count then."),
    ] = None,
    end_with_stdin: Annotated[bool, typer.Option("--end-with-stdin", hidden=True)] = False,
) -> None:
    """Serve until a signal comes. Options win over the environment, that over .env.

    On SIGTERM or SIGINT new turns are refused, and those that run have DRAIN_TIMEOUT_S to end;
    a second signal skips that wait.

    To restart without an error for anybody, let a supervisor hold the listening socket (systemd
    does: --fd 3), start the next process with --fd N --wait-for-store, and when that says that it
    is ready send the old one SIGTERM: it accepts nothing more, connections wait in the socket's
    queue, and the next process serves them as soon as the old one has closed the store.
    """
    given = {
        "host": host,
        "port": port,
        "store_url": store_url,
        "model_provider": model_provider,
        "model_name": model_name,
        "log_level": log_level,
        "log_format": log_format,
        "accept_volatile": True if accept_volatile else None,
    }
    settings = read_settings({name: value for name, value in given.items() if value is not None})
    listener = listen(settings, fd, insecure=insecure)
    if workers > 1:
        chosen = {name.upper(): str(value) for name, value in given.items() if value is not None}
        supervise(settings, listener, workers, chosen, ["--insecure"] if insecure else [])
    run(settings, listener, wait_for_store, shares_socket=fd is not None, ends_with_stdin=end_with_stdin)


def supervise(
    settings: Settings, listener: socket.socket, workers: int, chosen: dict[str, str], options: list[str]
) -> NoReturn:
    """Keep worker processes running until a signal comes, and end as they did."""
    if not settings.is_store_shared:
        fail("--workers needs a store that processes can share: STORE_URL postgresql:// or redis://")
    from app.server import announce
    from app.telemetry.logs import configure_logs
    from app.workers import Supervisor

    configure_logs(settings.log_format, settings.log_level, settings.secrets())
    supervisor = Supervisor(
        workers, listener, chosen, options, lambda: announce(settings, listener, workers=workers)
    )
    sys.exit(asyncio.run(supervisor.run()))


@cli.command()
def migrate_store(
    source: Annotated[str, typer.Argument(metavar="FROM", help="The store to copy, a URL as in STORE_URL.")],
    target: Annotated[str, typer.Argument(metavar="TO", help="The store to copy to.")],
    force: Annotated[bool, typer.Option(help="Copy although a server announces itself there.")] = False,
    skip_broken: Annotated[
        bool, typer.Option(help="Succeed although some sessions cannot be read and stay behind.")
    ] = False,
    accept_volatile: Annotated[
        bool, typer.Option(help="Copy although TO may lose it when the power fails [ACCEPT_VOLATILE].")
    ] = False,
) -> None:
    """Copy everything from one store to another, and compare. Stop the servers first.

    TO must be empty, or hold an earlier copy of FROM. Repeating it is safe, also after it was killed.

    Exit codes: 0 copied and verified, 1 not, 2 wrong usage.
    """
    from app.migrate import WrongUsage, migrate
    from app.telemetry.logs import configure_logs
    from app.telemetry.redaction import secrets_in_url

    settings = read_settings({"accept_volatile": True} if accept_volatile else {})
    secrets = [*settings.secrets(), *secrets_in_url(source), *secrets_in_url(target)]
    configure_logs(settings.log_format, settings.log_level, secrets)
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            move = migrate(settings, source, target, force=force, skip_broken=skip_broken)
            is_good = runner.run(move)
    except WrongUsage as error:
        print(f"agentpool: {error}", file=sys.stderr)
        sys.exit(2)
    if not is_good:
        sys.exit(1)


@cli.command()
def rotate_keys(
    force: Annotated[bool, typer.Option(help="Although a server announces itself in the store.")] = False,
    skip_broken: Annotated[
        bool, typer.Option(help="Succeed although something cannot be read, or the files not be scrubbed.")
    ] = False,
) -> None:
    """Encrypt everything in STORE_URL with the first of ENCRYPTION_KEYS. Stop the servers first.

    What is encrypted with another of the keys, or not at all, is so afterwards, too, and the other
    keys can be dropped. Repeating it is safe, also after it was killed.

    Exit codes: 0 all is encrypted, 1 not, 2 wrong usage.
    """
    from app.migrate import WrongUsage
    from app.rotate import rotate
    from app.telemetry.logs import configure_logs

    settings = read_settings({})
    configure_logs(settings.log_format, settings.log_level, settings.secrets())
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            is_good = runner.run(rotate(settings, force=force, skip_broken=skip_broken))
    except WrongUsage as error:
        print(f"agentpool: {error}", file=sys.stderr)
        sys.exit(2)
    if not is_good:
        sys.exit(1)


key_cli = typer.Typer(
    no_args_is_help=True, help="The keys that clients come in with, where AUTH_MODE is api_key."
)
cli.add_typer(key_cli, name="keys")


@key_cli.command("create")
def create_key(
    user: Annotated[str, typer.Option(help="The user whom it belongs to, and whose sessions it opens.")] = "",
    scope: Annotated[str, typer.Option(help="user or admin.")] = "user",
    label: Annotated[str | None, typer.Option(help="What it is for.")] = None,
    expires_days: Annotated[int | None, typer.Option(help="How long it counts; left out: for ever.")] = None,
) -> None:
    """Make a key and print it. It is kept nowhere, and never shown again."""
    with key_commands() as keys:
        made, text = keys.create(user, scope, label, expires_days)
    print(text)
    print(f"agentpool: key {made.id} of {made.user_id}, scope {made.scope}: keep it now", file=sys.stderr)


@key_cli.command("list")
def list_keys() -> None:
    """List the keys, revoked ones too: id, user, scope, whether it counts, label."""
    with key_commands() as keys:
        for line in keys.lines():
            print(line)


@key_cli.command("revoke")
def revoke_key(key_id: Annotated[str, typer.Argument(metavar="ID", help="As `keys list` shows it.")]) -> None:
    """Have a key count no more; running servers know within a second."""
    with key_commands() as keys:
        keys.revoke(key_id)
    print(f"agentpool: key {key_id} counts no more", file=sys.stderr)


@contextlib.contextmanager
def key_commands() -> Iterator["KeyCommands"]:
    """Yield what changes the keys; end with one line if it cannot."""
    from app.identity.key_commands import KeyCommands, WrongUsage
    from app.runtime import SystemClock
    from app.telemetry.logs import configure_logs

    settings = read_settings({})
    configure_logs(settings.log_format, settings.log_level, settings.secrets())
    try:
        yield KeyCommands(settings.api_keys_file, settings.audit_file, SystemClock())
    except WrongUsage as error:
        print(f"agentpool: {error}", file=sys.stderr)
        sys.exit(2)
    except (AgentPoolError, ValueError, OSError) as error:
        fail(str(error))


def listen(settings: Settings, fd: int | None, *, insecure: bool) -> socket.socket:
    """Return the socket to listen on, or end with one line that says why there is none."""
    from app.server import bind, take_over

    insecure = insecure or settings.auth_mode != "none"
    if fd is None and not is_loopback(settings.host):
        require_permission(insecure, f"HOST {settings.host}")
    try:
        listener = bind(settings.host, settings.port) if fd is None else take_over(fd)
    except OSError as error:
        where = f"{settings.host}:{settings.port}" if fd is None else f"descriptor {fd}"
        fail(f"cannot listen on {where}: {error.strerror or error}")
    if fd is not None and not is_loopback(listener.getsockname()[0]):
        require_permission(insecure, f"the socket's address {listener.getsockname()[0]}")
    return listener


def run(
    settings: Settings,
    listener: socket.socket,
    wait_for_store: bool,
    *,
    shares_socket: bool,
    ends_with_stdin: bool = False,
) -> None:
    """Serve on the fastest event loop there is."""
    from app.domain.errors import StoreLocked, StoreUnavailable
    from app.server import serve
    from app.telemetry.logs import configure_logs

    configure_logs(settings.log_format, settings.log_level, settings.secrets())
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(
                serve(
                    settings,
                    listener,
                    wait_for_store=wait_for_store,
                    shares_socket=shares_socket,
                    ends_with_stdin=ends_with_stdin,
                )
            )
    except (StoreLocked, StoreUnavailable, ValueError) as error:
        fail(str(error))


def read_settings(given: dict[str, Any]) -> Settings:
    """Read the settings, or end with one line for each that is wrong."""
    try:
        return Settings(**given)
    except ValidationError as error:
        for problem in error.errors(include_input=False, include_url=False):
            name = "_".join(str(part) for part in problem["loc"][:1]).upper()
            print(
                f"agentpool: {name}: {problem['msg']}" if name else f"agentpool: {problem['msg']}",
                file=sys.stderr,
            )
        sys.exit(2)


def require_permission(given: bool, what: str) -> None:
    """End if strangers could use the server and nobody has said that they may."""
    if not given:
        fail(f"{what} is reachable from elsewhere and AUTH_MODE is none; --insecure allows it")


def is_loopback(host: str) -> bool:
    """Say whether only this machine can reach ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def fail(reason: str) -> NoReturn:
    print(f"agentpool: {reason}", file=sys.stderr)
    sys.exit(1)


def _loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:  # not made for this platform
        return None
    return uvloop.new_event_loop


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as above, for the installed command
    cli(prog_name="agentpool")


if __name__ == "__main__":
    main()
