"""Use cases: one public method is one request's story.

``Services`` is the bundle that every face works with.
"""

from dataclasses import dataclass

from app.services.admin import AdminService
from app.services.chat import ChatService
from app.services.sessions import SessionManager


@dataclass(frozen=True, slots=True)
class Services:
    chat: ChatService
    sessions: SessionManager
    admin: AdminService
