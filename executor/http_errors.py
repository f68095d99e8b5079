"""What is wrong with a request, said in OpenAI's form."""

import difflib
from collections.abc import Mapping
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from rankwright.executor.openai_api import (
    PROMPT_KINDS,
    ChatRequest,
    CompletionRequest,
    ErrorBody,
    ErrorDetail,
)

_BODIES: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
}


class ApiError(Exception):
    """What a client is told instead of an answer."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        """Say `message` with HTTP status `status`; `param` is the field that is wrong."""
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = ErrorBody(error=ErrorDetail(message=message, type=kind, param=param, code=code))

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        """Return what is sent."""
        return JSONResponse(self.body.model_dump(), status_code=self.status, headers=headers)


def add_error_handlers(app: FastAPI) -> None:
    """Let every error of `app` leave in OpenAI's form."""

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return explain_invalid(error.errors()[0], request.url.path).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        texts = {
            404: f"there is no {request.url.path} here; see /docs",
            405: f"{request.url.path} does not take {request.method}; see /docs",
        }
        message = texts.get(error.status_code, str(error.detail))
        return ApiError(message, status=error.status_code).response(error.headers)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        # The server's log has the traceback; the client learns only that it is our fault.
        return ApiError(f"internal error ({type(error).__name__})", status=500).response()


def explain_invalid(error: dict[str, Any], path: str) -> ApiError:
    """Return what pydantic found wrong with the body of a request to `path`, in one line."""
    kind, context = str(error["type"]), cast("dict[str, Any]", error.get("ctx") or {})
    if kind == "json_invalid":
        return ApiError(
            f"the body is not JSON: {context.get('error')} at character {error['loc'][-1]}"
        )
    if kind == "not_supported":
        return ApiError(str(error["msg"]), param=context["name"], code="unsupported_parameter")
    where = [str(part) for part in error["loc"][1:] if part not in PROMPT_KINDS]
    param = ".".join(where) or None
    if param is None:
        message = str(error["msg"]).removeprefix("Value error, ")
        if kind in ("missing", "model_attributes_type"):
            message = "the body must be a JSON object, with Content-Type: application/json"
        return ApiError(message)
    if kind == "extra_forbidden":
        fields = _BODIES[path].model_fields if path in _BODIES and len(where) == 1 else {}
        near = difflib.get_close_matches(where[-1], fields, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "; leave it out"
        return ApiError(f"unknown field {param!r}{hint}", param=param, code="unknown_parameter")
    if kind == "missing":
        return ApiError(f"{param} is missing", param=param, code="missing_parameter")
    message = str(error["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    got = repr(error.get("input"))
    shown = got if len(got) <= 80 else f"{got[:77]}..."
    return ApiError(f"{param} {message[0].lower()}{message[1:]}, got {shown}", param=param)
