"""Whoever has OpenTelemetry configured sees the turns of the agents."""

import subprocess
import sys
from pathlib import Path

_PROGRAM = """
import asyncio
from opentelemetry import trace
from tests.unit.agents.making import demo_models, make_agent, run

class Tracer(trace.NoOpTracer):
    def start_as_current_span(self, name, *args, attributes, **kwargs):
        print(name, attributes["gen_ai.agent.name"], attributes["gen_ai.operation.name"])
        return super().start_as_current_span(name)

class Provider(trace.NoOpTracerProvider):
    def get_tracer(self, name, *args, **kwargs):
        return Tracer() if name == "autogen-core" else super().get_tracer(name)

agent = make_agent(demo_models())
asyncio.run(run(agent, "before"))
trace.set_tracer_provider(Provider())
asyncio.run(run(agent, "hello"))
"""


def test_a_turn_is_a_span_for_whoever_wants_spans() -> None:
    """A provider that is set after the start, and after turns without one, gets AutoGen's span."""
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout == "invoke_agent assistant assistant invoke_agent\n"
