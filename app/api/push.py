"""A way around the layers between a response and its connection, for the parts of its body.

``send`` costs a task switch and a coroutine in each layer, for every part. A server that knows
that nothing on the way changes bodies may put a ``Push`` into the scope of a request.
"""

from collections.abc import Callable
from typing import Final

PUSH_KEY: Final = "agentpool.push"

Push = Callable[[bytes], bool]
"""Writes a part of the body now, once the response has begun, or says that ``send`` has to wait."""
