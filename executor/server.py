"""The OpenAI-compatible HTTP server: routes, streams, and its health.

Nothing a client sends ends the server: what is wrong with a request is said in OpenAI's form, with
status 400 (404 for a model that is not served, 503 while starting or draining).
"""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Iterator
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from rankwright.executor.http_errors import ApiError, add_error_handlers
from rankwright.executor.openai_api import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionChoice,
    CompletionRequest,
    ModelCard,
    ModelList,
)
from rankwright.executor.service import (
    Service,
    chat_events,
    completion_events,
    gather,
    make_job,
)

# A step of the largest prefill takes a second or two; far beyond that a replica hangs.
STALL_S = 30.0
# OpenAI's default for plain completions; chats may fill the context.
_COMPLETION_MAX_TOKENS = 16

T = TypeVar("T")


def create_app(service: Service) -> FastAPI:
    """Return the HTTP application."""
    app = FastAPI(title="rankwright", docs_url="/docs", redoc_url=None)
    add_error_handlers(app)

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        arrived_s = time.monotonic()
        service.check_open(body.model)
        prompts = [
            await service.encode(prompt, add_special_tokens=True)
            if isinstance(prompt, str)
            else prompt
            for prompt in body.prompts
        ]
        job = make_job(service, body, prompts, body.max_tokens, _COMPLETION_MAX_TOKENS, arrived_s)
        head: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.model_name,
        }
        if body.stream:
            return _Events(completion_events(job, head, body.wants_usage))
        texts, reasons, num_tokens = await _until_gone(request, gather(job))
        choices = [
            CompletionChoice(index=i, text=text, finish_reason=reason)
            for i, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        return _json(Completion(**head, choices=choices, usage=job.usage(num_tokens)))

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        arrived_s = time.monotonic()
        service.check_open(body.model)
        try:
            text = service.tokenizer.render_chat(
                [message.for_template() for message in body.messages], **body.chat_template_kwargs
            )
        except ValueError as error:
            raise ApiError(str(error), param="messages") from None
        prompt = await service.encode(text, add_special_tokens=False)
        asked = body.max_completion_tokens or body.max_tokens
        job = make_job(service, body, [prompt], asked, None, arrived_s)
        head: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.model_name,
        }
        if body.stream:
            return _Events(chat_events(job, head, body.wants_usage))
        texts, reasons, num_tokens = await _until_gone(request, gather(job))
        choices = [
            ChatChoice(index=i, message=AssistantMessage(content=text), finish_reason=reason)
            for i, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        return _json(ChatCompletion(**head, choices=choices, usage=job.usage(num_tokens)))

    @app.get("/v1/models")
    async def models() -> ModelList:
        ready = service.front_end.is_ready
        card = ModelCard(
            id=service.model_name,
            created=service.created_s,
            root=service.model_name,
            max_model_len=service.front_end.max_model_len if ready else None,
        )
        return ModelList(data=[card])

    @app.get("/health")
    async def health() -> Response:
        status = health_status(service)
        code = 200 if status == "ok" else 503
        return JSONResponse({"status": status}, status_code=code)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return app


def health_status(service: Service) -> str:
    """Return 'ok', or what keeps the server from answering."""
    front_end = service.front_end
    if front_end.lost.is_set():
        return "failed"
    if not front_end.is_ready:
        return "starting"
    if service.draining:
        return "draining"
    stalled = front_end.stalled(STALL_S)
    if stalled:
        return f"stalled: replica {', '.join(map(str, stalled))}"
    return "ok"


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: who starts it decides when it ends."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield


def make_server(app: FastAPI) -> HttpServer:
    """Return a server for `app`; run `serve(sockets=[...])` and set `should_exit` to end it."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,  # a line a request would be most of the log
        lifespan="off",
        timeout_graceful_shutdown=2,
    )
    return HttpServer(config)


class _Events(StreamingResponse):
    """Server-sent events, ended with `[DONE]`; the job is taken back when the client goes."""

    def __init__(self, events: AsyncGenerator[BaseModel, None]) -> None:
        self._lines = _sse(events)
        super().__init__(
            self._lines,
            media_type="text/event-stream",
            # Proxies that buffer would turn a stream into one late answer.
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._lines.aclose()


async def _sse(events: AsyncGenerator[BaseModel, None]) -> AsyncGenerator[str, None]:
    try:
        async with contextlib.aclosing(events):
            async for event in events:
                yield f"data: {event.model_dump_json(exclude_unset=True)}\n\n"
    except ApiError as error:
        yield f"data: {error.body.model_dump_json()}\n\n"
    yield "data: [DONE]\n\n"


def _json(body: BaseModel) -> Response:
    return Response(body.model_dump_json(), media_type="application/json")


async def _until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`, which ends when the client hangs up."""
    job = asyncio.create_task(work)
    gone = asyncio.create_task(_hang_up(request))
    try:
        await asyncio.wait({job, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not job.done():
            raise ApiError("the client hung up", status=499)  # nginx's number; nobody reads it
        return job.result()
    finally:
        gone.cancel()
        job.cancel()
        await asyncio.gather(job, return_exceptions=True)


async def _hang_up(request: Request) -> None:
    """Return when the client hangs up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
