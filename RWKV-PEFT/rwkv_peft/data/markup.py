"""HTML -> Markdown, in which models write their answers, and which Google's exports keep as HTML."""

import re
from html.parser import HTMLParser
from types import MappingProxyType

PART, LINE = "\x1d", "\x1e"  # for a blank line, and the end of a line, until all is read
HEADINGS = MappingProxyType({f"h{level}": PART + "#" * level + " " for level in range(1, 7)})
OPENS = MappingProxyType(
    HEADINGS
    | {"p": PART, "div": PART, "table": PART, "blockquote": f"{PART}> ", "hr": f"{PART}---{PART}"}
    | {"br": LINE, "tr": f"{LINE}|", "td": " ", "th": " "}
)
CLOSES = MappingProxyType(
    dict.fromkeys((*HEADINGS, "p", "div", "table", "blockquote"), PART) | {"td": " |", "th": " |"}
)
AROUND = MappingProxyType({"b": "**", "strong": "**", "i": "*", "em": "*", "code": "`"})


class Markdown(HTMLParser):
    """Gathers the text of HTML that is fed to it, and its blocks of code."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.link, self.cells = "", "", 0
        self.lists = list[int | None]()  # the numbers of the open lists' last items, None for lists without
        self.blocks = list[str]()
        self.fenced = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        fields = {name: value or "" for name, value in attrs}
        if tag == "pre":
            self.blocks.append("\n")
            self.text, self.fenced = f"{self.text}{PART}\0{PART}", True
        elif self.fenced and (language := re.search(r"language-(\w+)", fields.get("class", ""))):
            self.blocks[-1] = language[1] + self.blocks[-1]
        elif tag in ("ul", "ol"):
            self.add(PART)
            self.lists.append(int(fields.get("start") or 1) - 1 if tag == "ol" else None)
        elif tag == "li" and self.lists:
            number = self.lists[-1]
            self.lists[-1] = None if number is None else number + 1
            self.text += LINE + "    " * (len(self.lists) - 1) + ("- " if number is None else f"{number + 1}. ")
        elif tag == "a":
            self.link = fields.get("href", "")
            self.text += "[" * bool(self.link)
        elif not self.fenced:
            self.cells = (0 if tag == "tr" else self.cells) + (tag in ("td", "th"))
            self.add(OPENS.get(tag, AROUND.get(tag, "")))

    def handle_endtag(self, tag: str) -> None:
        if tag == "pre":
            self.fenced = False
        elif tag in ("ul", "ol") and self.lists:
            self.lists.pop()
            self.add(PART)
        elif tag == "thead":
            self.text += f"{LINE}|{' --- |' * self.cells}"
        elif tag == "a" and self.link:
            self.text, self.link = f"{self.text}]({self.link})", ""
        elif not self.fenced:
            self.add(CLOSES.get(tag, AROUND.get(tag, "")))

    def handle_data(self, data: str) -> None:
        if self.fenced:
            self.blocks[-1] += data
        else:
            words = re.sub(r"\s+", " ", data)
            self.text += words if self.text[-1:] not in ("", " ", PART, LINE) else words.lstrip()

    def add(self, mark: str) -> None:
        self.text += mark.replace(PART, LINE) if self.lists else mark


def markdown(html: str) -> str:
    """The text of HTML, with its headings, lists, tables and code in Markdown."""
    parser = Markdown()
    parser.feed(html)
    parser.close()
    text = re.sub(rf"((?:^|[{PART}{LINE}]) *(?:-|\d+\.)|\|) [{PART}{LINE}]+", r"\1 ", parser.text)  # a paragraph in one
    text = re.sub(rf"[ {PART}{LINE}]*[{PART}{LINE}]", lambda gap: "\n\n" if PART in gap[0] else "\n", text)
    blocks = (f"```{block.rstrip()}\n```" for block in parser.blocks)
    return re.sub("\0", lambda _: next(blocks), text).strip()
