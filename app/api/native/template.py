"""What personalises a session's agent."""

from typing import Annotated, Any

from pydantic import Field

from app.api.native.fields import Body, FreeObject, JsonObject, Name
from app.api.native.redact import redact

PROMPT_MAX_CHARS = 32_000
CAPABILITIES_MAX = 100


class Template(Body):
    """Personalises the agent of one session."""

    system_prompt: Annotated[str, Field(max_length=PROMPT_MAX_CHARS)] | None = Field(
        default=None,
        description="Replaces the profile's. May name `{key}` of `context` and of the session's state, "
        "`{user:key}` and `{app:key}`.",
        examples=["You help {name} with the weather."],
    )
    context: FreeObject | None = Field(
        default=None,
        description="Fills the `{key}` placeholders of the system prompt.",
        examples=[{"name": "张三"}],
    )
    capabilities: Annotated[list[Name], Field(max_length=CAPABILITIES_MAX)] | None = Field(
        default=None,
        description="Which of the profile's tools the agent may use; left out, all of them.",
        examples=[["get_weather"]],
    )

    @property
    def names_prompt(self) -> bool:
        """Whether it sets, or takes away, what the agent is told to be."""
        return "system_prompt" in self.model_fields_set

    def to_json(self, *, redact_keys: bool) -> JsonObject | None:
        """Return what was given, ``None`` if that is nothing."""
        patch = self.to_patch(redact_keys=redact_keys)
        return {name: value for name, value in patch.items() if value is not None} or None

    def to_patch(self, *, redact_keys: bool) -> JsonObject:
        """Return what was given, ``null`` too, as a merge patch."""
        given: dict[str, Any] = {
            name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set
        }
        if redact_keys and "context" in given:
            given["context"] = redact(given["context"])
        return given
