"""What the inside needs from the outside, in the words of the domain."""

from app.ports.agents import AgentFactory, Emit, LiveAgent
from app.ports.basics import Clock, NewId, PoolObserver
from app.ports.counting import Count, RequestCounter
from app.ports.leases import SessionLeases
from app.ports.moving import MovableStore
from app.ports.nodes import Nodes
from app.ports.store import SessionStore

__all__ = [
    "AgentFactory",
    "Clock",
    "Count",
    "Emit",
    "LiveAgent",
    "MovableStore",
    "NewId",
    "Nodes",
    "PoolObserver",
    "RequestCounter",
    "SessionLeases",
    "SessionStore",
]
