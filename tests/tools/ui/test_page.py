"""The page in a real browser: a stranger's way from a file of rows to a chat with the merged model."""

import json
import re
import time
from pathlib import Path

import pytest

from rwkv_peft.tools.ui.command import entrance
from tools.ui.pages import LONG, go, press

expect = pytest.importorskip("playwright.sync_api", reason="needs the extra test").expect
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


def test_from_rows_to_a_chat_with_the_merged_model(open_page, folder):
    page = open_page()
    page.get_by_role("radio", name="base.pth").check()
    press(page, "Take this base")
    rows = page.get_by_role("textbox", name="Another file or folder")
    press(page, "look for Another file or folder")
    chosen = {"name": "rows.jsonl", "mimeType": "", "buffer": b'{"text": "mine"}\n' * 100_000}  # in two parts
    page.get_by_role("dialog").get_by_label("Or a file from elsewhere").set_input_files(chosen)
    expect(rows).to_have_value("rows-2.jsonl")
    assert (folder / "rows-2.jsonl").read_bytes() == chosen["buffer"]
    dropped = page.evaluate_handle(
        "() => { const all = new DataTransfer(); all.items.add(new File(['a'], '.b<i>.jsonl')); return all; }"
    )
    rows.dispatch_event("drop", {"dataTransfer": dropped})
    expect(rows).to_have_value("b_i_.jsonl")
    rows.fill("missing.jsonl")
    rows.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("missing.jsonl: there is no such file")
    page.get_by_role("radio", name="pairs.jsonl").check()
    press(page, "Show them as: a better and a worse answer")
    expect(page.locator("mark").first).to_have_text(" yes<end>")
    page.get_by_label("Kind of rows", exact=True).select_option("sft")
    (folder / "sheet.csv").write_text("Frage;Die Antwort\nRegen?;ja\n", "utf-8-sig")
    rows.fill("sheet.csv")
    rows.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("Regen?")
    page.get_by_label("Columns", exact=True).fill('Frage "Die Antwort"')
    press(page, "Show")
    expect(page.locator("mark").first).to_have_text(" ja<end>", timeout=LONG)
    page.get_by_label("Columns", exact=True).fill("")
    press(page, "look for Another file or folder")
    page.get_by_role("dialog").get_by_text("rows.jsonl").click()
    expect(page.get_by_label("Tokenizer", exact=True)).to_have_value("bytes")  # the base's
    expect(page.locator("mark").first).to_have_text(' {"name": "Ann"}\n<end>')
    press(page, "Train on these rows")

    expect(page.locator(".taken")).to_contain_text(re.compile("base.pth.*rows.jsonl"))
    page.get_by_text("More settings").click()
    page.get_by_label("Precision", exact=True).select_option("fp32")
    page.get_by_label("Rows a step", exact=True).fill("8")
    page.get_by_label("Times through the rows", exact=True).fill("4")
    page.get_by_label("Rank", exact=True).fill("7")
    expect(page.get_by_role("alert")).to_contain_text("--bone_r 7")
    expect(page.locator(".wrong").get_by_label("Rank", exact=True)).to_be_visible()
    page.get_by_label("Rank", exact=True).fill("32")
    expect(page.locator("#plan")).to_contain_text("fits")
    expect(page.locator("#plan")).to_contain_text("the time is not known")
    expect(page.locator("#command")).to_contain_text("--bone_r 32")
    press(page, "Start training")

    state = page.locator(".figure", has_text="state")
    expect(state).to_contain_text("done")
    page.reload()
    expect(state).to_contain_text("done")
    expect(page.locator(".u-legend").first).to_contain_text("held-out loss")
    expect(page.get_by_role("article").filter(has_text="after training").locator("ins").first).to_be_visible()
    expect(page.locator(".note").filter(has_text="word for word")).to_contain_text(
        "are answered word for word after the last step"
    )
    assert (folder / "out/mine/adapter.safetensors").exists()
    drawn = [{"step": step, "prompt": "Hi", "completion": f"said {step}", "reward": 1.0} for step in (0, 1)]
    (folder / "out/mine/answers.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in drawn))
    page.reload()
    expect(page.get_by_role("article").filter(has_text="said 1")).to_be_visible()
    page.get_by_label("step", exact=True).select_option("0")
    expect(page.get_by_role("article").filter(has_text="said 0")).to_be_visible()

    other = open_page(width=390)  # another browser, on a narrow screen
    go(other, "Runs")
    expect(other.get_by_role("link", name="out/mine", exact=True)).to_be_visible()
    expect(other.locator(".figure", has_text="state")).to_contain_text("done")
    assert other.locator("html").evaluate("page => page.scrollWidth") <= 390

    go(page, "Train")
    expect(page.locator(".figure", has_text="about, for 20 steps")).to_contain_text(re.compile(r"\d s"))
    expect(page.locator("#plan")).to_contain_text("that of the steps of out/mine,")
    with open(folder / "out/mine/metrics.jsonl", "a") as metrics:
        metrics.write('{"step": 20, "samples": 1000, "val_loss": 99.0}\n')
    go(page, "Runs")
    page.get_by_role("link", name="out/mine", exact=True).click()
    page.locator("main").get_by_role("link", name="Take home", exact=True).click()
    of_run = page.get_by_label("Of this run", exact=True)
    expect(of_run).to_have_value("out/mine/adapter-best.safetensors")
    expect(page.get_by_label("Merged model", exact=True)).to_have_value("out/mine/merged-best.pth")
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Merged model", exact=True).fill("mine.pth")
    for command in ("Make the file", "Check"):
        press(page, command)
        expect(page.locator(".job .state")).to_have_text("done")
    assert (folder / "mine.pth").exists()

    go(page, "Runs")
    page.get_by_role("link", name="out/mine", exact=True).click()
    page.locator("main").get_by_role("link", name="Talk", exact=True).click()
    page.get_by_text("Models and sampling", exact=True).click()
    expect(page.get_by_label("Adapter", exact=True)).to_have_value("out/mine/adapter-best.safetensors")
    of_run.select_option("out/mine/adapter.safetensors")
    page.get_by_label("Weights", exact=True).select_option("int8")
    page.get_by_label("Tokenizer", exact=True).fill("bytes")
    page.get_by_label("Temperature", exact=True).fill("0")
    page.get_by_label("Longest answer", exact=True).fill("24")
    press(page, "Open out/mine beside base")
    message = page.get_by_label("message", exact=True)
    message.fill("Ann has 3 red cups.")
    message.dispatch_event("keydown", {"key": "Enter", "isComposing": True})  # ends a word of an input method
    expect(message).to_have_value("Ann has 3 red cups.")
    message.press("Enter")
    for name in ("base", "out/mine"):
        said = page.get_by_role("article", name=name, exact=True).locator(".words")
        expect(said).to_have_text(re.compile("[^…]{3}"))
    page.get_by_label("Thinking", exact=True).select_option("low")  # which the demo's model has not learned
    press(page, "Regenerate")
    for name in ("base", "out/mine"):
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
    page.get_by_text("Models and sampling", exact=True).click()
    expect(page.get_by_text("open: base, out/mine")).to_be_visible()
    press(page, "Close")
    expect(page.get_by_text("open: base")).to_be_hidden()
    expect(page.get_by_role("button", name="Open out/mine beside base")).to_be_visible()


def test_the_file_that_a_browser_is_started_with_leads_to_the_page(browser, server, folder):
    context = browser.new_context()
    page = context.new_page()
    with entrance(server.url, folder) as file:
        page.goto(Path(file.name).as_uri())
        page.wait_for_url(server.home + "**")
        expect(page.get_by_role("heading", level=1)).to_have_text("Base")
    assert "key" not in page.url
    page.goto(server.home)  # the browser has the key now
    expect(page.get_by_role("heading", level=1)).to_have_text("Base")
    context.clear_cookies()
    page.goto(server.home)
    expect(page.get_by_role("heading", level=1)).to_have_text("This page needs its key")
    context.close()


def test_a_command_that_fails_says_why_and_a_run_is_stopped_and_goes_on(open_page, folder):
    page = open_page()
    go(page, "Train")
    page.get_by_role("link", name="to the content").press("Enter")
    expect(page.locator("main")).to_be_focused()
    page.get_by_text("More settings").click()
    fields = {"Base": "base.pth", "Rows": "rows.jsonl", "Tokenizer": "bytes", "Name of the run": "100 % long"}
    for label, value in {**fields, "Times through the rows": "10000", "Rows a step": "1"}.items():
        page.get_by_label(label, exact=True).fill(value)
    page.get_by_label("Precision", exact=True).select_option("fp32")
    press(page, "Start training")
    state, stop = page.locator(".figure", has_text="state"), page.get_by_role("button", name="Stop after this step")
    stop.dblclick()  # the second click does nothing
    expect(page.locator(".job .state")).to_have_text("stopped")
    expect(state).to_contain_text("stopped")
    metrics = folder / "100 % long" / "metrics.jsonl"
    size = metrics.stat().st_size
    press(page, "Resume")
    until = time.monotonic() + LONG / 1000
    while metrics.stat().st_size == size:
        assert time.monotonic() < until
        page.wait_for_timeout(100)
    stop.click()
    expect(state).to_contain_text("stopped")
    go(page, "Runs")
    page.get_by_role("link", name="100 % long", exact=True).click()
    expect(state).to_contain_text("stopped")

    go(page, "Take home")
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Run, or adapter", exact=True).fill("none.safetensors")
    page.get_by_label("Base", exact=True).fill("base.pth")
    page.get_by_label("Merged model", exact=True).fill("x.pth")
    press(page, "Make the file")
    expect(page.locator(".job .state")).to_have_text("failed (2)")
    expect(page.get_by_role("alert")).to_contain_text("none.safetensors")
