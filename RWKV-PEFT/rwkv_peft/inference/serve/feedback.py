"""POST /v1/feedback: the latest answers of chats by their ids, for what clients say of them afterwards."""

from collections import OrderedDict
from dataclasses import dataclass, field

from ...cli.errors import UserError, short
from ...data.chat import words_of
from ...data.feedback import Answered, FeedbackFile, Turn, scaled
from .catalog import Catalog
from .conversation import Conversation
from .requests import ChatBody, FeedbackBody, wrong
from .responses import REASONING, CompletionPart, Fields, call_fields
from .web import RequestError

BYTES = 64 << 20  # of the bodies of the chats that are remembered


@dataclass
class RememberedChat:
    """A request with the parts of its answers by their numbers, and the size of its body in bytes."""

    body: ChatBody
    size: int
    parts: dict[int, list[CompletionPart]] = field(default_factory=dict)

    def add(self, part: CompletionPart) -> None:
        self.parts.setdefault(part.number, []).append(part)


class AnswerLog:
    """The answers to which feedback may come, the latest of up to BYTES, and the file that takes it."""

    def __init__(self, file: FeedbackFile, catalog: Catalog) -> None:
        self.file, self.catalog = file, catalog
        self.chats = OrderedDict[str, RememberedChat]()
        self.size = 0

    def follow(self, body: ChatBody, size: int, conversation: Conversation) -> None:
        """Remember a chat whose body has `size` bytes, and its answers as they come."""
        chat = self.chats[str(conversation.response.head["id"])] = RememberedChat(body, size)
        conversation.on_part = chat.add
        self.size += size
        while self.size > BYTES and len(self.chats) > 1:
            self.size -= self.chats.popitem(last=False)[1].size

    def take(self, feedback: FeedbackBody) -> None:
        """Write what a client says of an answer. Raises RequestError for an answer that is not remembered, or not whole
        yet, and for a better one that cannot be learned."""
        chat = self.chats.get(feedback.id)
        if chat is None or feedback.index >= chat.body.times:
            what = f"{short(feedback.id)!r}" + f" with the index {feedback.index}" * (chat is not None)
            message = f"there is no answer {what} among the latest chats of this server; give the id of its response"
            raise RequestError(404, message, "id" if chat is None else "index")
        parts = chat.parts.get(feedback.index, [])
        if not parts or not parts[-1].end:
            raise RequestError(409, "the answer is not complete; send feedback when it has ended", "id")
        answered = self.answered(chat.body, CompletionPart.joined(parts))
        try:
            if feedback.text is not None:
                self.file.correct(answered, feedback.text)
            else:
                self.file.judge(answered, feedback.mark == "good")
        except UserError as error:
            raise wrong("mark" if feedback.text is None else "text", str(error)) from error

    def answered(self, body: ChatBody, part: CompletionPart) -> Answered:
        """A whole answer with its turns, and the files that gave it."""
        turns: list[Turn] = list(body.messages)
        begun = words_of(turns.pop(), "content") if body.prefilled else ""
        answer: Fields = {"role": "assistant", "content": begun + part.text}
        answer |= {REASONING: part.thinking} if part.thinking else {}
        answer |= {"tool_calls": call_fields(part.calls)} if part.calls else {}
        scales = body.adapters or {body.model or "": 1.0 if body.adapter_scale is None else body.adapter_scale}
        files = self.catalog.files
        adapter = " ".join(scaled(files[name], scale) for name, scale in scales.items() if name in files)
        whole = part.end in ("end", "stop")
        return Answered(turns, answer, str(self.catalog.args.model), adapter, body.tools or (), whole)
