"""How the gateway words refusals: like OpenAI under /v1, with Moestro's kind, message and hint elsewhere."""

from collections.abc import Mapping

from starlette.responses import JSONResponse

from moestro.errors import ArtifactError, BusyError, ConflictError, GateError, InputError, MoestroError, ResourceError

RETRY_AFTER_SECONDS = "5"
STATUS: dict[type[MoestroError], int] = {
    ArtifactError: 404,
    InputError: 404,
    BusyError: 409,
    ConflictError: 409,
    GateError: 409,
    ResourceError: 503,
}
CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    403: "not_allowed",
    404: "not_found",
    405: "method_not_allowed",
    409: "conflict",
    413: "request_too_large",
    503: "model_unavailable",
}


class Refused(Exception):  # noqa: N818
    """A request that gets no answer from a model. `status`, `code` and `param` are what the client is told."""

    def __init__(self, status: int, message: str, *, code: str = "", param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code or CODES.get(status, "refused")
        self.param = param

    def response(self) -> JSONResponse:
        """What the client is told, in OpenAI's words; a 503 says when to come again, a 413 ends the connection."""
        headers = {503: {"Retry-After": RETRY_AFTER_SECONDS}, 413: {"Connection": "close"}}.get(self.status)
        return openai_error(self.status, self.message, code=self.code, param=self.param, headers=headers)


class UnknownModelError(Refused):
    """Nothing is served under the name that was asked for."""

    def __init__(self, message: str) -> None:
        super().__init__(404, message, code="model_not_found", param="model")


class UnavailableError(Refused):
    """What was asked for is to be served, but does not answer now."""

    def __init__(self, message: str, *, version: str = "") -> None:
        super().__init__(503, message)
        self.version = version
        """The version that should have answered, where no process was asked."""


def in_v1(path: str) -> bool:
    """Whether `path` lies in the part of the API that is OpenAI's."""
    return path == "/v1" or path.startswith("/v1/")


def openai_error(
    status: int, message: str, *, code: str = "", param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """An error as OpenAI's clients expect it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"message": message, "type": kind, "param": param, "code": code or CODES.get(status)}
    return JSONResponse({"error": body}, status_code=status, headers=dict(headers or {}))


def api_error(error: MoestroError) -> JSONResponse:
    """A `MoestroError` as a 4xx (or 503) response; one without a status of its own has that of what it is a kind of."""
    body = {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
    status = next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 400)
    headers = {"Retry-After": RETRY_AFTER_SECONDS} if status == 503 else None
    return JSONResponse({"error": body}, status_code=status, headers=headers)


def refusal(
    path: str, status: int, message: str, headers: Mapping[str, str] | None = None, *, code: str = ""
) -> JSONResponse:
    """A refusal in the words of the part of the API that `path` lies in; `code` is OpenAI's."""
    if in_v1(path):
        return openai_error(status, message, code=code, headers=headers)
    body = {"kind": "HTTPError", "message": message, "hint": ""}
    return JSONResponse({"error": body}, status_code=status, headers=dict(headers or {}))
