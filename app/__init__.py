"""AgentPool: every conversation gets its own live agent.

The names below are for those who embed it; each is loaded when it is first used,
so that ``import app`` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from app.config import Settings as Settings
    from app.main import create_app as create_app
    from app.pool.manager import AgentManager as AgentManager
    from app.runtime import Runtime as Runtime
    from app.services.chat import ChatService as ChatService
    from app.services.sessions import SessionManager as SessionManager

__version__ = "0.1.0"

_HOMES = {
    "AgentManager": "app.pool.manager",
    "ChatService": "app.services.chat",
    "Runtime": "app.runtime",
    "SessionManager": "app.services.sessions",
    "Settings": "app.config",
    "create_app": "app.main",
}
__all__ = ["AgentManager", "ChatService", "Runtime", "SessionManager", "Settings", "create_app"]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)
