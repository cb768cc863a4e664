"""The page's one path, from an empty folder to a merged model that answers, and its texts in each language."""

import json
import re
from pathlib import Path

import pytest

from rwkv_peft.tools import ui
from rwkv_peft.tools.download import OFFICIAL, REPOSITORY
from rwkv_peft.tools.ui.form import form
from tools.hub import Hub
from tools.ui.pages import ROOT, go, press

expect = pytest.importorskip("playwright.sync_api", reason="needs the extra test").expect
PAGE = Path(ui.__file__).parent / "page"
MORE_BASES = "More bases: the demo, and official ones"
MARKDOWN = """<img src=x onerror=alert(1)> <b>x</b> **bold** [y](javascript:alert(1)) ![z](https://example.com/z.png)

- one
- two ☃

```python
print("<b>")
```

<script>alert(1)</script>
<iframe src="https://example.com"></iframe><svg onload=alert(1)>

[web](https://example.com/) &lt;i&gt; <a href="https://example.com">html</a>
"""
HOSTILE = (
    "".join(  # an answer, in pieces
        f"data: {json.dumps({'choices': [{'delta': {'content': MARKDOWN[at : at + 7]}}]})}\n\n"
        for at in range(0, len(MARKDOWN), 7)
    )
    + 'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("empty")


def steps_done(page):
    return page.get_by_role("navigation").get_by_role("img", name="done")


def say(page, text):
    message = page.get_by_label("message", exact=True)
    message.fill(text)
    message.press("Enter")


def test_from_an_empty_folder_to_a_merged_model_that_answers(open_page, server, folder):
    page = open_page(width=390)
    expect(page.get_by_role("heading", level=1)).to_have_text("Base")
    page.get_by_label("Size", exact=True).select_option(label="0.1B")
    page.get_by_text("From another place, or by a terminal").click()
    expect(page.get_by_text("hf download BlinkDL/rwkv7-g1 rwkv7-g1d-0.1b-20260129-ctx8192.pth")).to_be_visible()
    press(page, "Use the demo")

    expect(page.get_by_role("heading", level=1)).to_have_text("Rows")
    turns = page.locator(".document").first.locator(".turn")
    expect(turns.nth(0)).to_contain_text(re.compile(r"User.*What is there\?"))
    expect(turns.nth(1).locator("mark")).to_contain_text("Aye! ")
    expect(steps_done(page)).to_have_count(2)
    press(page, "Train on these rows")

    expect(page.locator("#plan")).to_contain_text("fits")
    press(page, "Start training")
    now = page.locator(".now")
    expect(now).to_have_text("It is trained. Talk to it, or take it home.")
    expect(page.locator("h2 .state")).to_have_text("done")
    expect(page.get_by_role("heading", level=1)).to_have_text("Train")
    assert (folder / "out/mine/adapter.safetensors").exists()
    (job,) = (one for one in server.json("/api/jobs") if one["words"][0] == "train")
    assert server.json("/api/runs/one?folder=out/mine")["job"] == job["id"]
    page.reload()
    expect(now).to_have_text("It is trained. Talk to it, or take it home.")
    expect(page.locator(".u-legend").first).to_contain_text("held-out loss")
    expect(page.get_by_role("article").filter(has_text="after training").locator("ins").first).to_be_visible()
    printed = page.get_by_text("The command, and what it printed")
    expect(page.get_by_label("What it printed")).to_be_hidden()
    printed.click()
    expect(page.get_by_label("What it printed")).to_contain_text("finished")
    go(page, "Base")
    expect(page.get_by_role("radio", name="rwkv7-demo.pth")).to_be_checked()
    expect(steps_done(page)).to_have_count(3)
    go(page, "Train")
    expect(page.locator(".figure", has_text="about, for 136 steps")).to_contain_text(re.compile(r"\d s"))
    expect(page.locator("#plan")).to_contain_text("that of the steps of out/mine,")

    go(page, "Take home")
    press(page, "Make the file")
    expect(page.get_by_role("link", name="Download out/mine/merged.pth")).to_be_visible()
    expect(page.get_by_label("What it printed")).to_be_hidden()
    expect(steps_done(page)).to_have_count(4)
    press(page, "Talk to it")
    press(page, "Open out/mine/merged")
    say(page, "Ann has 3 red cups. What is there?")
    expect(page.get_by_role("article")).to_contain_text("Aye! 3 red cups")
    expect(steps_done(page)).to_have_count(5)
    press(page, "Rewrite")
    page.get_by_label("A better answer").fill("Three, captain!")
    press(page, "This is better")
    expect(page.get_by_role("article")).to_contain_text("“Rewrite” is noted in my-feedback.jsonl ✓")
    row = json.loads((folder / "my-feedback.jsonl").read_text())
    assert (
        row["chosen"] == "Three, captain!"
        and row["rejected"].startswith("Aye!")
        and row["model"] == "out/mine/merged.pth"
    )
    rows = {"path": "my-feedback.jsonl", "tokenizer": "bytes"}
    assert [len(server.json("/api/preview", rows | {"data_type": kind})["sizes"]) for kind in ("sft", "pairs")] == [
        1,
        2,
    ]
    go(page, "Rows")
    page.get_by_role("radio", name="my-feedback.jsonl").check()
    expect(page.locator("mark").first).to_contain_text("Three, captain!")
    go(page, "Runs")
    earlier, learned = (folder / f"out/mine/adapter{label}.safetensors" for label in ("", "-learned"))
    before = earlier.read_bytes()
    press(page, "Learn from my feedback")
    expect(page.get_by_role("heading", name="Learned from feedback")).to_be_visible()
    card = page.get_by_role("article").filter(has_text="Three, captain!").first
    expect(card).to_contain_text("before training")
    expect(card).to_contain_text("after training")
    assert learned.exists() and earlier.read_bytes() == before
    assert page.locator("html").evaluate("page => page.scrollWidth") <= 390
    page.get_by_role("link", name="Talk to it").click()
    expect(page.locator("#which option", has_text="What feedback has taught")).to_have_count(1)
    go(page, "Runs")
    press(page, "Take back")
    expect(page.get_by_role("heading", name="Learned from feedback")).to_be_hidden()
    assert not learned.exists() and earlier.read_bytes() == before
    assert page.locator("html").evaluate("page => page.scrollWidth") <= 390


def test_the_best_of_a_run_is_taken_checked_and_talked_to(open_page, folder):
    """With the run of the test before."""
    drawn = [{"step": step, "prompt": "Hi", "completion": f"said {step}", "reward": 1.0} for step in (0, 1)]
    (folder / "out/mine/answers.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in drawn))
    with open(folder / "out/mine/metrics.jsonl", "a") as metrics:
        metrics.write('{"step": 136, "samples": 1000, "val_loss": 99.0}\n')
    page = open_page()
    go(page, "Runs")
    expect(page.get_by_role("article").filter(has_text="said 1")).to_be_visible()
    page.get_by_label("step", exact=True).select_option("0")
    expect(page.get_by_role("article").filter(has_text="said 0")).to_be_visible()
    page.locator("main").get_by_role("link", name="Take home", exact=True).click()
    of_run = page.get_by_label("What to take of this run", exact=True)
    expect(of_run).to_have_value("out/mine/adapter-best.safetensors")
    expect(page.get_by_label("Merged model", exact=True)).to_have_value("out/mine/merged-best.pth")
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Merged model", exact=True).fill("mine.pth")
    for command in ("Make the file", "Check"):
        press(page, command)
        expect(page.locator(".job .state")).to_have_text("done")
    assert (folder / "mine.pth").exists()

    go(page, "Runs")
    page.locator("main").get_by_role("link", name="Talk", exact=True).click()
    page.get_by_text("Models and answers", exact=True).click()
    expect(page.get_by_label("Adapter", exact=True)).to_have_value("out/mine/adapter-best.safetensors")
    of_run.select_option("out/mine/adapter.safetensors")
    page.get_by_text("State, tokenizer, weights").click()
    page.get_by_label("Weights", exact=True).select_option("int8")
    page.get_by_label("Tokenizer", exact=True).fill("bytes")
    page.locator(".drawer").get_by_text("More", exact=True).click()
    page.get_by_label("Temperature", exact=True).fill("0")
    page.get_by_label("Longest answer", exact=True).fill("24")
    press(page, "Open out/mine beside rwkv7-demo")
    message = page.get_by_label("message", exact=True)
    message.fill("Ann has 3 red cups.")
    message.dispatch_event("keydown", {"key": "Enter", "isComposing": True})  # ends a word of an input method
    expect(message).to_have_value("Ann has 3 red cups.")
    message.press("Enter")
    for name in ("rwkv7-demo", "out/mine"):
        said = page.get_by_role("article", name=name, exact=True).locator(".words")
        expect(said).to_have_text(re.compile("[^…]{3}"))
    page.get_by_label("Thinking", exact=True).select_option("low")  # which the demo's model has not learned
    press(page, "Regenerate")
    for name in ("rwkv7-demo", "out/mine"):
        said = page.get_by_role("article", name=name, exact=True).locator(".words")
        expect(said).to_have_text(re.compile("^<think"))
    page.route("**/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=HOSTILE))
    press(page, "Regenerate")
    said = page.get_by_role("article", name="out/mine", exact=True).locator(".words")
    expect(said.locator("li")).to_have_text(["one", "two ☃"])
    expect(said.locator("pre")).to_have_text('print("<b>")')
    expect(said.locator("strong")).to_have_text("bold")
    expect(said.locator("a")).to_have_attribute("href", "https://example.com/")
    expect(said).to_contain_text("<img src=x onerror=alert(1)>")
    assert said.locator("img, script, iframe, svg, b, i, form, style").count() == 0 and said.locator("a").count() == 1
    page.reload()
    expect(page.locator(".turn.user .words").last).to_have_text("Ann has 3 red cups.")
    press(page, "Edit the last")
    expect(message).to_have_value("Ann has 3 red cups.")
    expect(page.locator(".turn")).to_have_count(0)
    page.get_by_text("Models and answers", exact=True).click()
    expect(page.get_by_text("open: rwkv7-demo, out/mine")).to_be_visible()
    opened = page.get_by_role("listitem").filter(has_text="open: rwkv7-demo, out/mine")
    opened.get_by_role("button", name="Close").click()
    expect(opened).to_be_hidden()
    expect(page.get_by_role("button", name="Open out/mine beside rwkv7-demo")).to_be_visible()


def test_the_page_speaks_the_browsers_language_or_the_one_that_is_chosen(browser, server):
    context = browser.new_context(locale="zh-CN")
    page = context.new_page()
    page.goto(server.url)
    expect(page.get_by_role("heading", level=1)).to_have_text("底模")
    expect(page.locator("html")).to_have_attribute("lang", "zh")
    page.locator("nav a[href='#train']").click()
    expect(page.get_by_role("button", name="开始训练")).to_be_visible()
    page.get_by_label("语言").select_option("en")
    expect(page.get_by_role("heading", level=1)).to_have_text("Train")
    page.reload()
    expect(page.get_by_role("button", name="Start training")).to_be_visible()
    context.close()


def test_both_languages_have_a_text_for_each_key_and_no_text_stands_outside_the_table(browser):
    page = browser.new_page()
    page.route(
        "**/*", lambda route: route.fulfill(content_type="text/javascript", body=(PAGE / "texts.js").read_text())
    )
    page.goto("http://127.0.0.1/page/texts.js")
    texts = page.evaluate("import('/page/texts.js').then((table) => table.TEXTS)")
    page.close()
    for english, chinese in texts.values():
        assert english.strip() and chinese.strip()
        assert set(re.findall(r"\{\d\}", english)) == set(re.findall(r"\{\d\}", chinese))
    sources = {file.name: re.sub(r"(?m)(^|\s)//.*$", "", file.read_text()) for file in PAGE.glob("*.js")}
    sources["texts.js"] = sources["texts.js"].partition("export const LANGUAGES")[2]
    code = "\n".join(sources.values())
    assert set(re.findall(r'\bt\("([^"]+)"', code)) <= texts.keys()
    first, *others = [
        {f"value.{field['flag']}.{value}" for field in group["fields"] for value in field["values"]} for group in form()
    ]
    assert first <= {key for key in texts if key.startswith("value.")} <= first.union(*others)
    starts = tuple(re.findall(r"`([a-z]+\.[\w. ]*)\$\{", code))
    assert [key for key in texts if f'"{key}"' not in code and not key.startswith(starts)] == []
    assert [(name, text) for name, code in sources.items() for text in literals(code)] == []


def test_an_official_base_comes_by_a_button(open_page, folder):
    content = (ROOT / "demo/rwkv7-demo.pth").read_bytes()
    (folder / "rwkv7-demo.pth").write_bytes(content)
    with Hub(REPOSITORY, OFFICIAL[0], content) as hub:
        page = open_page()
        go(page, "Base")
        page.get_by_text(MORE_BASES).click()
        page.get_by_label("Size", exact=True).select_option(label="0.1B")
        page.get_by_text("From another place, or by a terminal").click()
        page.get_by_label("Mirror's address", exact=True).fill(hub.address)
        press(page, "Download")
        expect(page.get_by_role("radio", name=OFFICIAL[0])).to_be_checked()
    assert (folder / OFFICIAL[0]).read_bytes() == content
    (folder / OFFICIAL[0]).unlink()
    page.get_by_text(MORE_BASES).click()
    page.get_by_label("Size", exact=True).select_option(label="0.4B")
    press(page, "Download")
    expect(page.get_by_role("alert")).to_contain_text("was not downloaded from http://127")
    expect(page.get_by_role("button", name="Download", exact=True)).to_be_enabled()
    expect(page.get_by_text("hf download BlinkDL/rwkv7-g1 rwkv7-g1d-0.4b-")).to_be_visible()


def test_the_official_bases_are_the_documents_newest():
    document = (ROOT / "docs/start/models.md").read_text()
    assert set(re.findall(r"\brwkv7-g1\w-[\w.-]+\.pth", document)) == set(OFFICIAL)


def literals(code):
    """The texts in a program that a person would read: children of elements, names for screen readers, and errors."""
    child = r'el\("\w+", \{[^{}]*\}, (["`][^"`]*["`])'
    named = r'(?:aria-label"|ariaLabel|placeholder|title|textContent)(?:: | = )(["`][^"`]*["`])'
    found = [
        text
        for form in (child, named, r"Error\((['\"`][^'\"`]*)", r'figure\((["`][^"`]*)')
        for text in re.findall(form, code)
    ]
    return [text for text in found if re.search("[A-Za-z]{2}", re.sub(r"\$\{[^{}]*\}", "", text))]
