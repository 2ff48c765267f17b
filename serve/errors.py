"""OpenAI's form of an error."""

from __future__ import annotations

from starlette.responses import JSONResponse


class ApiError(Exception):
    """An answer in OpenAI's error form with this HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        """`retry_after` seconds the client should wait before it asks again."""
        super().__init__(message)
        # a message may quote what JSON can say and UTF-8 cannot: half a surrogate pair
        message = message.encode("utf-8", "replace").decode()
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body, self.status, self.headers)


def unreadable(adapter: str, reason: str) -> ApiError:
    """The answer where an adapter's files are wrong, lost or changed."""
    return ApiError(400, f"the adapter '{adapter}' cannot be served: {reason}", param="model")
