"""The refusal of a request, in OpenAI's form."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..streams import encoded

RETRY = 5  # seconds after which a client that finds no place may try again
KINDS = MappingProxyType({401: "authentication_error", 403: "permission_error", 404: "not_found_error"})


class Refused(Exception):
    """A request that is not answered: HTTP's status, what is wrong and the remedy, the field, and OpenAI's code."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        self.message, self.param = encoded(message).decode(), param and encoded(param).decode()

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else KINDS.get(self.status, "invalid_request_error")
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> Mapping[str, str]:
        return {"retry-after": str(RETRY)} if self.status in (429, 503) else {}
