"""The kinds of field that requests are made of, each with its rules and its words."""

import unicodedata
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from app.domain.branch import ROOT
from app.domain.checkpoint import check_data
from app.domain.errors import InvalidInput
from app.domain.free_object import OBJECT_MAX_DEPTH, check_free_object
from app.domain.ids import (
    NAME_MAX_CHARS,
    NAME_PATTERN,
    SESSION_ID_PATTERN,
    parse_name,
    parse_session_id,
    parse_uuid,
)
from app.domain.state import check_keys

TITLE_MAX_CHARS = 200
MODEL_MAX_CHARS = 200
STOP_MAX = 8
STOP_MAX_CHARS = 200
TTL_MAX_S = 1_000_000_000

JsonObject = dict[str, Any]


class Body(BaseModel):
    """A request's body: no field but the known ones, no value taken for another type's."""

    model_config = ConfigDict(strict=True, extra="forbid")


class NoQuery(BaseModel):
    """The query of a route that takes no parameter; base of those that do."""

    model_config = ConfigDict(extra="forbid")


def check_message(text: str, max_chars: int) -> None:
    """Refuse a message that is too long, or in which nothing can be seen.

    Raises:
        InvalidInput
    """
    if not 1 <= len(text) <= max_chars:
        raise InvalidInput("message", f"must have 1 to {max_chars} characters")
    if all(is_blank(character) for character in text):
        raise InvalidInput("message", "must have a visible character")


def is_blank(character: str) -> bool:
    """Whether it is a separator, a control or a format character (Unicode Z*, Cc, Cf)."""
    category = unicodedata.category(character)
    return category[0] == "Z" or category in ("Cc", "Cf")


def left_out(value: Any) -> Any:
    """Return ``None`` for an empty text."""
    return None if value == "" else value


def one_line(value: str) -> str:
    """Return a text without control characters."""
    if any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in value):
        raise ValueError("must not have a control character in it")
    return value


def check_alone(value: Any, info: ValidationInfo, other: str) -> None:
    """Refuse a field that is given together with ``other``, which is declared before it.

    Raises:
        ValueError
    """
    if value is not None and info.data.get(other) is not None:
        raise ValueError(f"cannot be given with {other}")


def _checked(parse: Callable[[Any, str], Any]) -> AfterValidator:
    """Let one of the domain's parsers judge a field."""

    def check(value: Any) -> Any:
        try:
            return parse(value, "")
        except InvalidInput as error:
            if not error.field:
                raise ValueError(error.message) from None
            raise _inside(error) from None

    return AfterValidator(check)


def _inside(error: InvalidInput) -> ValidationError:
    """Return ``error`` so that the path below the field goes on behind that of the field."""
    steps = error.field.removeprefix(".").split(".")[: OBJECT_MAX_DEPTH + 2]
    details = InitErrorDetails(
        type=PydanticCustomError("value_error", error.message),
        loc=tuple(steps),
        input=None,
    )
    return ValidationError.from_exception_data("", [details])


def _state(value: Any, field: str) -> Any:
    check_keys(value, field)
    return check_free_object(value, field)


def _parent(text: Any, field: str) -> Any:
    return text if text == ROOT else parse_uuid(text, field)


def _count(text: Any) -> Any:
    if not (isinstance(text, str) and text.isascii() and text.isdigit()):
        raise ValueError("must be a whole number")
    return int(text[:12])


def _flag(text: Any) -> Any:
    if text not in ("true", "false"):
        raise ValueError("must be true or false")
    return text == "true"


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


_NAME_SCHEMA = WithJsonSchema(
    {"type": "string", "minLength": 1, "maxLength": NAME_MAX_CHARS, "pattern": NAME_PATTERN}
)

SessionIdField = Annotated[
    str, _checked(parse_session_id), WithJsonSchema({"type": "string", "pattern": SESSION_ID_PATTERN})
]
OptionalSessionId = Annotated[SessionIdField | None, BeforeValidator(left_out)]
Name = Annotated[str, _checked(parse_name), _NAME_SCHEMA]
TurnIdField = Annotated[str, _checked(parse_uuid), WithJsonSchema({"type": "string", "format": "uuid"})]
ModelName = Annotated[str, Field(min_length=1, max_length=MODEL_MAX_CHARS), AfterValidator(one_line)]
Title = Annotated[str, Field(min_length=1, max_length=TITLE_MAX_CHARS), AfterValidator(one_line)]
FreeObject = Annotated[JsonObject, _checked(check_free_object)]
State = Annotated[JsonObject, _checked(_state)]
CheckpointData = Annotated[JsonObject, _checked(check_data)]
Parent = Annotated[
    str,
    _checked(_parent),
    WithJsonSchema({"anyOf": [{"const": ROOT}, {"type": "string", "format": "uuid"}]}),
]
TtlSeconds = Annotated[int, Field(ge=0, le=TTL_MAX_S)]

Limit = Annotated[int, Field(ge=1, le=200), BeforeValidator(_count)]
Position = Annotated[int, Field(ge=0), BeforeValidator(_count)]
Flag = Annotated[bool, BeforeValidator(_flag)]
_Stop = Annotated[str, Field(min_length=1, max_length=STOP_MAX_CHARS)]
_Stops = Annotated[list[_Stop], Field(min_length=1, max_length=STOP_MAX)]
Cursor = Annotated[str, Field(min_length=1, max_length=1024)]


class Params(Body):
    """How the model is to answer. What is left out is up to the model."""

    temperature: float | None = Field(default=None, ge=0, le=2, description="Randomness.", examples=[0.2])
    top_p: float | None = Field(default=None, ge=0, le=1, description="Nucleus sampling.", examples=[0.9])
    max_tokens: int | None = Field(
        default=None, ge=1, le=10_000_000, description="Longest answer, in tokens.", examples=[800]
    )
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        default=None, description="How long a reasoning model may think.", examples=["low"]
    )
    seed: int | None = Field(default=None, description="For repeatable answers.", examples=[7])
    stop: (
        Annotated[
            _Stops,
            BeforeValidator(_as_list, json_schema_input_type=_Stop | _Stops),
        ]
        | None
    ) = Field(default=None, description="Texts at which the answer ends.", examples=[["END"]])

    def to_json(self) -> JsonObject:
        """Return what was given."""
        return self.model_dump(exclude_none=True)


class SessionQuery(NoQuery):
    """``user_id``: the session must be this user's, or it is not found."""

    user_id: Name | None = Field(
        default=None,
        description="Whose session it must be. Where credentials are asked for, only an admin may name "
        "another user than their own.",
        examples=["alice"],
    )


class PageQuery(NoQuery):
    """A page of a list."""

    limit: Limit = Field(default=50, description="Most entries of a page.", examples=[50])
    cursor: Cursor | None = Field(default=None, description="`next_cursor` of the page before.")
