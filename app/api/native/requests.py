"""What clients send: the bodies and queries of the native face."""

from typing import Annotated, Any, Literal, get_args

from pydantic import (
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
    field_validator,
)

from app.api.errors import invalid_fields
from app.api.native.fields import (
    Body,
    FreeObject,
    JsonObject,
    Limit,
    ModelName,
    Name,
    OptionalSessionId,
    PageQuery,
    Params,
    Parent,
    Position,
    SessionIdField,
    SessionQuery,
    State,
    Title,
    TtlSeconds,
    TurnIdField,
)
from app.api.native.redact import redact
from app.api.native.template import Template
from app.api.owner import Namespace, require_operator
from app.domain.chat import ChatRequest, OnBusy, OnDisconnect
from app.domain.session import UNSET, SessionChange, SessionStatus, Unset
from app.services.sessions import NewSession

BATCH_MAX = 1000

StatusName = Literal["active", "idle", "archived", "expired"]
StatusChange = Literal["active", "idle", "archived"]
_STATUS_SCHEMA = {"type": "string", "enum": list(get_args(StatusChange))}  # nor is there none


def _agree(value: Any, other: Any, name: str) -> Any:
    if value is not None and other is not None and value != other:
        raise ValueError(f"differs from {name}")
    return value


class ModelChoice(Body):
    """Who is to answer, and how."""

    agent_id: Name | None = Field(
        default=None, description="The agent profile; see `GET /agents`.", examples=["assistant"]
    )
    provider: ModelName | None = Field(
        default=None, description="The model's provider; see `GET /models`.", examples=["openai"]
    )
    model: ModelName | None = Field(
        default=None, description="The model; see `GET /models`.", examples=["gpt-5-mini"]
    )
    model_name: ModelName | None = Field(
        default=None, description="Another name for `model`.", examples=["gpt-5-mini"]
    )
    params: Params | None = Field(
        default=None, description="How the model is to answer.", examples=[{"temperature": 0.2}]
    )

    @field_validator("model_name")
    @classmethod
    def _one_model(cls, value: str | None, info: ValidationInfo) -> str | None:
        agreed: str | None = _agree(value, info.data.get("model"), "model")
        return agreed


class SessionName(Body):
    """What a session is to be called."""

    session_id: OptionalSessionId = Field(
        default=None, description="Its id; left out, one is generated.", examples=["user_001"]
    )
    conversation_id: OptionalSessionId = Field(
        default=None, description="Another name for `session_id`.", examples=["user_001"]
    )

    @field_validator("conversation_id")
    @classmethod
    def _one_session(cls, value: str | None, info: ValidationInfo) -> str | None:
        agreed: str | None = _agree(value, info.data.get("session_id"), "session_id")
        return agreed


class _Choices(ModelChoice, SessionName):
    """What both a new session and a turn may choose."""

    user_id: Name | None = Field(default=None, description="Whose session it is.", examples=["alice"])
    window_id: Name | None = Field(
        default=None, description="One of the user's windows or devices.", examples=["desktop"]
    )
    app_name: Name | None = Field(
        default=None, description="The application that it belongs to.", examples=["default"]
    )
    metadata: FreeObject | None = Field(
        default=None,
        description="Free data: 64 KiB, 32 deep, 1,000 keys. Values under keys like `password` are redacted.",
        examples=[{"language": "zh-CN"}],
    )

    def free_metadata(self, redact_keys: bool) -> JsonObject:
        """Return the metadata as it may be stored."""
        metadata: JsonObject = self.metadata or {}
        return redact(metadata) if redact_keys else metadata


class OnBusyBody(Body):
    """What to do while a turn of the session runs."""

    on_busy: Literal["queue", "reject", "interrupt", "rollback"] | None = Field(
        default=None,
        description="While another turn of the session runs: wait for it (`queue`), be refused (`reject`), "
        "or cancel it, keeping what it has said (`interrupt`) or not (`rollback`).",
        examples=["queue"],
    )

    def to_on_busy(self) -> OnBusy:
        return OnBusy(self.on_busy or "queue")


class TurnOptions(OnBusyBody):
    """How a turn behaves."""

    on_disconnect: Literal["continue", "cancel"] | None = Field(
        default=None,
        description="When the last watcher has been gone for 2 s: the turn goes on, or is cancelled.",
        examples=["continue"],
    )

    def to_on_disconnect(self) -> OnDisconnect:
        return OnDisconnect(self.on_disconnect or "continue")


class ChatBody(TurnOptions, _Choices):
    """One message to an agent. Only ``message`` is required."""

    message: str = Field(
        description="What to say: 1 to 100,000 characters (or as the server is set), one of them visible.",
        examples=["你好，我叫张三"],
        min_length=1,
    )
    parent: Parent | None = Field(
        default=None,
        description="Continue from this committed turn, or from the beginning (`root`), on a new branch. "
        "Left out, from the head when the turn starts.",
        examples=[None],
    )

    def to_request(
        self,
        namespace: Namespace,
        *,
        redact_keys: bool,
        expected_head: str | Unset | None = UNSET,
        idempotency_key: str | None = None,
    ) -> ChatRequest:
        return ChatRequest(
            owner=namespace.owner,
            message=self.message,
            session_id=self.session_id or self.conversation_id,
            user_id=namespace.user_id,
            window_id=self.window_id,
            app_name=self.app_name,
            agent_id=self.agent_id,
            provider=self.provider,
            model=self.model or self.model_name,
            params=None if self.params is None else self.params.to_json(),
            metadata=self.free_metadata(redact_keys),
            on_busy=self.to_on_busy(),
            on_disconnect=self.to_on_disconnect(),
            parent=self.parent,
            expected_head=expected_head,
            idempotency_key=idempotency_key,
        )


class NewSessionBody(_Choices):
    """A session to be created; everything may be left out."""

    title: Title | None = Field(default=None, description="A name for people.", examples=["Weather"])
    ttl_s: TtlSeconds | None = Field(
        default=None,
        description="Seconds without activity until it expires; 0: never. Left out, the server's setting.",
        examples=[86400],
    )
    state: State | None = Field(
        default=None,
        description="What the session's state begins as; limits as for `metadata`. "
        "No key may begin with `temp:`, `app:` or `user:`.",
        examples=[{"language": "zh-CN"}],
    )
    template: Template | None = Field(default=None, description="Personalises the agent.")

    def to_new_session(self, namespace: Namespace, *, redact_keys: bool) -> NewSession:
        """Return the session that is to be made in ``namespace``.

        Raises:
            Forbidden: its agent would be told what only the operator may tell it.
        """
        if self.template is not None and self.template.system_prompt is not None:
            require_operator(namespace)
        return NewSession(
            owner=namespace.owner,
            session_id=self.session_id or self.conversation_id,
            user_id=namespace.user_id,
            window_id=self.window_id,
            agent_id=self.agent_id,
            app_name=self.app_name,
            title=self.title,
            metadata=self.free_metadata(redact_keys),
            provider=self.provider,
            model=self.model or self.model_name,
            params={} if self.params is None else self.params.to_json(),
            state=redact(self.state or {}) if redact_keys else self.state or {},
            template=None if self.template is None else self.template.to_json(redact_keys=redact_keys),
            ttl_s=self.ttl_s,
        )


class ResumeBody(Body):
    """Whose newest active session is wanted."""

    user_id: Name = Field(description="Whose session it is.", examples=["alice"])
    agent_id: Name | None = Field(default=None, description="Only with this agent.", examples=["assistant"])
    window_id: Name | None = Field(default=None, description="Only of this window.", examples=["desktop"])

    def to_new_session(self, namespace: Namespace) -> NewSession:
        return NewSession(
            owner=namespace.owner,
            user_id=namespace.user_id,
            agent_id=self.agent_id,
            window_id=self.window_id,
        )


def _refused_alone(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    try:
        return handler(value)
    except ValidationError as error:
        return invalid_fields([{**entry, "loc": ("entry", *entry["loc"])} for entry in error.errors()])


class BatchBody(Body):
    """Sessions to be created; an entry that is malformed becomes the error that says so."""

    sessions: list[Annotated[NewSessionBody, WrapValidator(_refused_alone)]] = Field(
        max_length=BATCH_MAX, description="As for `POST /sessions`."
    )


class BatchDeleteBody(Body):
    """Sessions to be deleted."""

    session_ids: list[SessionIdField] = Field(
        max_length=BATCH_MAX, description="Their ids; one named twice counts once.", examples=[["user_001"]]
    )


class SessionPatch(Body):
    """A JSON merge patch (RFC 7396): what is left out stays, ``null`` takes a value away."""

    title: Title | None = Field(default=None, description="A name for people.", examples=["Weather"])
    metadata: FreeObject | None = Field(
        default=None,
        description="Merged into the metadata; `null` takes a key away.",
        examples=[{"tier": "premium"}],
    )
    status: Annotated[StatusChange | None, WithJsonSchema(_STATUS_SCHEMA)] = Field(
        default=None,
        description="`active` restarts the expiry clock, too; `archived` stops it, and stops chat.",
        examples=["archived"],
    )
    provider: ModelName | None = Field(
        default=None, description="The model's provider from the next turn on.", examples=["openai"]
    )
    model: ModelName | None = Field(
        default=None, description="The model from the next turn on.", examples=["gpt-5-mini"]
    )
    model_name: ModelName | None = Field(default=None, description="Another name for `model`.")
    params: Params | None = Field(
        default=None,
        description="Merged into the parameters; `null` takes one, or all, away.",
        examples=[{"temperature": 0.2}],
    )
    ttl_s: TtlSeconds | None = Field(
        default=None, description="Seconds without activity until it expires; 0: never.", examples=[86400]
    )
    template: Template | None = Field(
        default=None, description="Merged into what personalises the agent; `null` takes it away."
    )

    @field_validator("status")
    @classmethod
    def _has_status(cls, value: str | None) -> str:
        if value is None:
            raise ValueError("cannot be taken away")
        return value

    @field_validator("model_name")
    @classmethod
    def _one_model(cls, value: str | None, info: ValidationInfo) -> str | None:
        agreed: str | None = _agree(value, info.data.get("model"), "model")
        return agreed

    def to_change(self, namespace: Namespace, *, redact_keys: bool) -> SessionChange:
        """Return the change as ``namespace`` allows it.

        To take the template away leaves the system prompt to the operator.

        Raises:
            Forbidden: it would change what only the operator may tell the agent.
        """
        given = self.model_fields_set
        values: dict[str, Any] = {
            name: getattr(self, name) for name in ("title", "provider", "model", "ttl_s") if name in given
        }
        if "model_name" in given and values.get("model") is None:
            values["model"] = self.model_name
        if "params" in given:
            values["params"] = None if self.params is None else self.params.model_dump(exclude_unset=True)
        if "metadata" in given:
            values["metadata"] = redact(self.metadata) if redact_keys else self.metadata
        if "template" in given:
            template = self.template
            if template is not None and template.names_prompt:
                require_operator(namespace)
            values["template"] = None if template is None else template.to_patch(redact_keys=redact_keys)
            if template is None and not namespace.is_admin:
                values["template"] = {"context": None, "capabilities": None}
        return SessionChange(status=UNSET if self.status is None else SessionStatus(self.status), **values)


class CancelBody(Body):
    """Which turns to cancel, and what becomes of the text so far."""

    keep_partial: bool | None = Field(
        default=None, description="Keep what was produced so far (default).", examples=[True]
    )
    turn_id: TurnIdField | None = Field(
        default=None, description="Another turn than the running one; a waiting one too.", examples=[None]
    )
    all: bool | None = Field(default=None, description="Every running and waiting turn.", examples=[False])


class SessionListQuery(PageQuery):
    """Filters of the list of sessions."""

    user_id: Name | None = Field(default=None, description="Only this user's.", examples=["alice"])
    agent_id: Name | None = Field(default=None, description="Only with this agent.", examples=["assistant"])
    window_id: Name | None = Field(default=None, description="Only of this window.", examples=["desktop"])
    status: StatusName | None = Field(default=None, description="Only in this status.", examples=["active"])
    q: str | None = Field(
        default=None,
        max_length=200,
        description="Part of the title, in any case, or the beginning of the id.",
        examples=["weather"],
    )


class SessionGetQuery(SessionQuery):
    """What to tell of a session."""

    include: Literal["state"] | None = Field(
        default=None,
        description="`state`: its state, too, with the user's keys as `user:key` and the application's "
        "as `app:key`.",
        examples=["state"],
    )


class TurnListQuery(PageQuery, SessionQuery):
    """A page of turns."""


class HistoryQuery(SessionQuery):
    """A page of the conversation, counted in messages; turns are never split."""

    limit: Limit = Field(default=50, description="Most messages of a page, in whole turns.", examples=[50])
    before: TurnIdField | None = Field(default=None, description="`next_before` of the page after.")


class WatchQuery(SessionQuery):
    """From where to watch a turn."""

    after: Position | None = Field(
        default=None, description="Send what follows this `seq`; `Last-Event-ID` goes first.", examples=[0]
    )
