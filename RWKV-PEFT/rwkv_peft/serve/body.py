"""The bodies of answers."""

import json
from typing import Any

from fastapi.responses import JSONResponse

from ..streams import encoded


class Body(JSONResponse):
    """JSON, of texts that are not Unicode too, such as a file's name or what a model wrote as "\\ud800"."""

    def render(self, content: Any) -> bytes:
        return encoded(json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")))
