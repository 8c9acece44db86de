"""The pool that measurements work with: the demo model, and SQLite in a temporary folder."""

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from app import Runtime, Settings


@asynccontextmanager
async def pool_of(places: int, **settings: Any) -> AsyncIterator[Runtime]:
    """A runtime with an empty store and this many places."""
    with tempfile.TemporaryDirectory() as folder:
        chosen = Settings(
            _env_file=None,
            store_url=f"sqlite:///{Path(folder) / 'measure.db'}",
            model_provider="demo",
            agent_max_instances=places,
            **settings,
        )
        async with Runtime(chosen) as runtime:
            await runtime.chat.chat("first", "load what is loaded lazily")
            yield runtime
