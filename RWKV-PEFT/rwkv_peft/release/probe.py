"""Ask an endpoint what a proof asked a trained model, and name what is wrong there: `rwkv-peft prove FILE --url URL`.

A proof is this file with its data behind it, as JSON in the last line. It runs by itself wherever Python does:

    python proof.py --url http://127.0.0.1:8000
"""

import argparse
import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

VERSION, BEGINS = 1, "# proof: "  # of the line of data, and its beginning
MOST_BYTES = 1 << 24  # of a reply
BEHIND = 16  # tokens requested behind a chat's answer: an endpoint without its stop goes on there
PARTS = ("tokenizer", "sampling", "model file", "adapter", "quantization", "template", "stop")
OK, WRONG, UNKNOWN = "ok", "WRONG", "unknown"
OTHER, CUT, ON = "has other words", "ends too early", "goes on behind its end"
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # fields of a message before its content


class Unanswered(Exception):
    """An endpoint that does not answer, or a file that is no proof; the HTTP status of a refusal, else 0."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Reply(NamedTuple):
    """An answer's text, the reason for its end, and the tokens of its prompt, None if they are not counted."""

    text: str
    end: str
    prompt: Any


class Mismatch(NamedTuple):
    """How a reply differs from an answer, by what margin in logits the model answers otherwise, and both in words."""

    kind: str
    margin: float
    words: str


class Endpoint:
    """An endpoint of OpenAI's or Ollama's interface. Raises Unanswered if it offers other than one model, and `model`
    names none."""

    def __init__(self, url: str, model: str, key: str, seconds: float) -> None:
        url = url.rstrip("/")
        self.root, self.seconds = url.removesuffix("/v1").removesuffix("/api"), seconds
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self.ollama = url.endswith("/api") or self.fetch("/")[1].startswith(b"Ollama is running")
        self.model = model
        if not model:
            path, models, name = ("/api/tags", "models", "name") if self.ollama else ("/v1/models", "data", "id")
            try:
                names = [str(one[name]) for one in self.send(path)[models]]
            except (LookupError, TypeError):
                names = []
            if len(names) != 1:
                raise Unanswered(f"{self.root}{path} lists {', '.join(names) or 'no model'}; name one by --model")
            self.model = names[0]

    def fetch(self, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, bytes]:
        """The status and the content of a reply. Raises Unanswered if none comes in time."""
        where, until, content = self.root + path, time.monotonic() + self.seconds, b""
        request = urllib.request.Request(where, json.dumps(body).encode() if body else None, self.headers)
        try:
            try:
                answer: Any = urllib.request.urlopen(request, timeout=self.seconds)
            except urllib.error.HTTPError as error:
                answer = error
            with answer:
                while part := answer.read1(1 << 16):
                    content += part
                    if time.monotonic() > until or len(content) > MOST_BYTES:
                        raise TimeoutError
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise Unanswered(f"{where}: no whole answer in {self.seconds:g} s; allow more by --seconds") from error
            words = str(reason) or type(reason).__name__
            raise Unanswered(f"{where}: {words}; start the endpoint, or check the address") from error
        return answer.status, content

    def send(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The object of a reply. Raises Unanswered for any other."""
        status, content = self.fetch(path, body)
        try:
            reply = json.loads(content)
        except (ValueError, RecursionError):
            reply = None
        if status < 400 and isinstance(reply, dict):
            return reply
        words = f"{self.root}{path} answers {status}, {content[:200].decode(errors='replace')!r}"
        raise Unanswered(f"{words}; is it an OpenAI-compatible or Ollama endpoint, and the model's name right?", status)

    def answer(self, prompt: Any, most: int, seed: int = 1) -> Reply:
        """Continue a prompt, a text, tokens or messages {role, content}, greedily by at most `most` tokens."""
        chat = isinstance(prompt, list) and isinstance(prompt[0], dict)
        body: dict[str, Any] = {"model": self.model, "stream": False, ("messages" if chat else "prompt"): prompt}
        path = ("/api/chat" if chat else "/api/generate") if self.ollama else f"/v1/{'chat/' * chat}completions"
        if self.ollama:
            body |= {"options": {"temperature": 0, "num_predict": most, "seed": seed, "repeat_penalty": 1}}
            body |= {} if chat else {"raw": True}
        else:
            body |= {"temperature": 0, "max_tokens": most, "seed": seed}
        reply = self.send(path, body)
        try:
            if self.ollama:
                message = reply["message"] if chat else {"content": reply["response"]}
                end, count = reply.get("done_reason"), reply.get("prompt_eval_count")
            else:
                choice = reply["choices"][0]
                message = choice["message"] if chat else {"content": choice["text"]}
                end, count = choice.get("finish_reason"), (reply.get("usage") or {}).get("prompt_tokens")
            text = next(filter(None, map(message.get, THOUGHTS)), "") + (message.get("content") or "")
        except (LookupError, TypeError, AttributeError) as error:
            raise Unanswered(f"{self.root}{path} answers in another form, {str(reply)[:200]}; check --url") from error
        return Reply(text, str(end), count)

    def tokens(self, text: str) -> Any:
        """The tokens of a text, or else their number; None if it reports neither."""
        for name in ("prompt", "content"):  # vLLM's field, which rwkv-peft shares, and llama.cpp's
            try:
                if isinstance(tokens := self.send("/tokenize", {name: text}).get("tokens"), list) and tokens:
                    return tokens
            except Unanswered as error:
                if not error.status:
                    raise
        try:
            return self.answer(text, 1).prompt
        except Unanswered as error:
            if not error.status:
                raise
            return None


def squeeze(text: str) -> str:
    """A text without white space, the marks of a thinking, and a last character that is cut."""
    return "".join(text.replace("<think>", "").replace("</think>", "").split()).rstrip("\ufffd")


def mismatch(prompt: str, answer: Mapping[str, Any], reply: Reply, stops: bool = False) -> Mismatch | None:
    """The Mismatch of a reply to a prompt from the answer due, None if there is none. stops: the answer's end
    counts."""
    expected, got = squeeze(answer["text"]), squeeze(reply.text)
    same, ends, margins = len(os.path.commonprefix([expected, got])), answer["ends"], answer["margins"]
    place = next((n for n, end in enumerate(ends) if end > same), len(ends))
    if same < min(len(expected), len(got)):
        kind, margins = OTHER, margins[: place + 1]
    elif same < len(expected) and stops and reply.end != "length":
        kind, margins = CUT, margins[: place + 1]
    elif same < len(got) and same == len(expected) and stops and answer["end"] != "length":
        kind = ON
    else:
        return None
    before = ends[place - 1] if place else 0
    margin = min(margins[ends.index(before) + 1 if before else 0 :])  # tokens without letters may differ unseen
    words = f"to {prompt[-60:]!r} {answer['text'][:60]!r} is due, and {reply.text[:60]!r} came (margin {margin:.2f})"
    return Mismatch(kind, margin, words)


class Asked(NamedTuple):
    """Prompts of a proof in one form (prompt, tokens or messages), the replies to them, those with another seed, and
    why there are none."""

    form: str
    prompts: list[Mapping[str, Any]]
    replies: list[Reply]
    again: list[Reply]
    refused: str = ""

    def mismatches(self, by: str, tie: float, again: bool = False) -> list[Mismatch | None]:
        """The Mismatch of each reply from the model's answer, or the base's if `by` is "base"; None for ties."""
        pairs, stops = zip(self.prompts, self.again if again else self.replies), self.form == "messages"
        results = [mismatch(each["prompt"], each[by], reply, stops) for each, reply in pairs]
        return [one if one and one.margin >= tie else None for one in results]

    def excess(self) -> list[int]:
        """By how many tokens each prompt was longer than it should be, if they are counted."""
        pairs = zip(self.prompts, self.replies)
        return [reply.prompt - len(each["tokens"]) for each, reply in pairs if isinstance(reply.prompt, int)]


def ask(endpoint: Endpoint, prompts: Sequence[Mapping[str, Any]], form: str) -> Asked:
    """Ask for the answers to prompts. Raises Unanswered, but not if the first is refused."""
    asked = Asked(form, [each for each in prompts if each[form]], [], [])
    for each in asked.prompts:
        most = len(each["answer"]["tokens"]) + BEHIND * (form == "messages")
        try:
            for seed, replies in enumerate((asked.replies, asked.again)):
                replies.append(endpoint.answer(each[form], most, seed))
        except Unanswered as error:
            if not error.status or asked.replies:
                raise
            return Asked(form, [], [], [], str(error))
    return asked


def check_tokenizer(endpoint: Endpoint, strings: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The verdict on a tokenizer, by tokens or by their number; each text may begin with one more."""
    begun = set[int]()
    for text, tokens in (each.values() for each in strings):
        there = endpoint.tokens(text)
        if there is None:
            return UNKNOWN, "the endpoint neither tokenizes nor counts"
        more = (len(there) if isinstance(there, list) else there) - len(tokens)
        begun.add(more if not isinstance(there, list) or there[more:] == tokens else -1)
        if len(begun) > 1 or not begun <= {0, 1}:
            return WRONG, f"{text!r} is {tokens[:16]}, {len(tokens)} tokens, and {str(there)[:80]} at the endpoint"
    return OK, ""


def diagnose(endpoint: Endpoint, proof: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """{part: (verdict, words)} of an endpoint. Raises Unanswered if it answers neither texts nor chats."""
    prompts, tie = proof["prompts"], proof["tie"]
    verdicts = dict.fromkeys(PARTS, (OK, "")) | {"tokenizer": check_tokenizer(endpoint, proof["strings"])}
    tokenized = verdicts["tokenizer"][0] != WRONG
    texts = ask(endpoint, prompts, "prompt" if tokenized or endpoint.ollama else "tokens")
    chats = ask(endpoint, prompts, "messages")
    if texts.refused and chats.refused:
        raise Unanswered(texts.refused)
    judged = chats if texts.refused else texts
    if texts.refused:
        verdicts["model file"] = OK, f"by chats alone, because texts are refused: {texts.refused}"

    def unknown(why: str, *parts: str) -> dict[str, tuple[str, str]]:
        return verdicts | dict.fromkeys(parts, (UNKNOWN, why))

    first, second = (judged.mismatches("answer", tie, again) for again in (False, True))
    changed = [squeeze(one.text) != squeeze(two.text) for one, two in zip(judged.replies, judged.again)]
    apart = [one or two for one, two, differs in zip(first, second, changed) if differs and (not one) != (not two)]
    if apart or 2 * sum(changed) > len(changed):
        words = f"at temperature 0, {sum(changed)} of {len(changed)} answers differ by the seed"
        verdicts["sampling"] = WRONG, "; ".join([words, *(one.words for one in apart[:1] if one)])
        return unknown("answers are random", *PARTS[2:])
    if not tokenized and judged.form != "tokens":
        return unknown("prompts have other tokens", *PARTS[2:])
    others, by = [one for one in first if one and one.kind == OTHER], "answer"
    longest = max(chats.excess(), default=0)
    if others and not any(one and one.kind == OTHER for one in judged.mismatches("base", tie)):
        verdicts["adapter"], by = (WRONG, f"the base answers; {others[0].words}"), "base"
    elif others and judged is chats and longest > 1:
        verdicts = unknown("see template", *PARTS[2:])
    elif others:
        small, begun = max(one.margin for one in others) < proof["coarse"], min(texts.excess(), default=0) > 0
        part = "tokenizer" if begun else "quantization" if small else "model file"
        verdicts = unknown(f"see {part}", *PARTS[2:])
        why = " (or the template is wrong: texts without one are refused)" if judged is chats else ""
        why = ", to prompts that begin with another token" if begun else why
        verdicts[part] = WRONG, f"{len(others)} of {len(first)} answers differ{why}; {others[0].words}"
    elif not any(mismatch("", each["answer"], Reply(each["base"]["text"], "", 0)) for each in prompts):
        verdicts = unknown("the base gives the same answers", "adapter")
    if chats.refused or not tokenized:
        verdicts = unknown(chats.refused or "see tokenizer", "template", "stop")
    elif not others or by == "base":
        ends = [one for one in chats.mismatches(by, tie) if one]
        laid = [one for one in ends if one.kind == OTHER]
        if laid:
            verdicts |= {
                "template": (WRONG, f"only chats are answered otherwise; {laid[0].words}"),
                "stop": (UNKNOWN, "see template"),
            }
        elif all(each[by]["end"] == "length" for each in chats.prompts):
            verdicts = unknown("no answer ends by itself", "stop")
        elif ends:
            verdicts["stop"] = WRONG, f"an answer {ends[0].kind}; {ends[0].words}"
    if longest > 1 and tokenized:
        verdicts["template"] = WRONG, f"prompts of chats are up to {longest} tokens longer than they should be"
    return verdicts


def read_proof(path: str) -> dict[str, Any]:
    """The data of a proof. Raises Unanswered for any other file."""
    try:
        with open(path, encoding="utf-8") as file:
            data: dict[str, Any] = json.loads(file.read().rpartition(f"\n{BEGINS}")[2])
        if data["version"] == VERSION:
            return data
        raise Unanswered(f"{path} is a proof of version {data['version']}, not {VERSION}; write it again")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise Unanswered(f"{path} is no proof ({type(error).__name__}); rwkv-peft prove RUN writes one") from error


def add_endpoint_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--url", metavar="URL", help="the endpoint, http://HOST:PORT; ending in /api by Ollama's interface")
    add("--model", default="", metavar="NAME", help="the model's name there (default: the only one)")
    add("--api_key", metavar="FILE", help="a file with the endpoint's key")
    add("--seconds", type=float, default=120.0, help="the longest wait for an answer (default 120)")


def prove(path: str, args: argparse.Namespace) -> int:
    """Print the verdict on each part of the endpoint of flags -> the exit code, 1 if one is wrong. Raises
    Unanswered."""
    proof, key = read_proof(path), ""
    if not str(args.url).startswith(("http://", "https://")) or not 0 < args.seconds < 1e6:
        raise Unanswered(f"--url {args.url} --seconds {args.seconds:g}: http://HOST:PORT and a time above 0 are due")
    if args.api_key:
        try:
            with open(args.api_key, encoding="utf-8") as file:
                key = file.read().strip()
        except (OSError, ValueError) as error:
            raise Unanswered(f"--api_key {args.api_key}: it cannot be read; name a file with the key") from error
    endpoint = Endpoint(args.url, args.model, key, args.seconds)
    print(f"{proof['of']}, {len(proof['prompts'])} prompts: {endpoint.model} at {endpoint.root}")
    verdicts = diagnose(endpoint, proof)
    for part, (verdict, words) in verdicts.items():
        print(f"{part:<14}{verdict:<9}{words}".rstrip())
    return int(WRONG in (verdict for verdict, _ in verdicts.values()))


def main(argv: Sequence[str]) -> int:
    """Run a proof as a script -> the exit code, 2 for an endpoint that does not answer."""
    parser = argparse.ArgumentParser(description="Name what is wrong at an endpoint of a trained model.")
    add_endpoint_flags(parser)
    try:
        return prove(__file__, parser.parse_args(argv))
    except Unanswered as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
