"""The page in a real browser: rows that are chosen, commands that fail, a run that is stopped and goes on."""

import re
import time
from pathlib import Path

import pytest

from rwkv_peft.tools.ui.command import entrance
from tools.ui.pages import LONG, go, press

expect = pytest.importorskip("playwright.sync_api", reason="needs the extra test").expect


def test_rows_are_looked_for_taken_in_shown_and_chosen(open_page, folder):
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
    expect(page.get_by_role("alert")).to_contain_text("There is no such file in the folder.")
    page.get_by_role("radio", name="pairs.jsonl").check()
    press(page, "Show them as: a better and a worse answer")
    expect(page.locator("mark").first).to_have_text(" yes<end>")
    page.get_by_label("Kind of rows", exact=True).select_option("sft")
    (folder / "sheet.csv").write_text("Frage;Die Antwort\nRegen?;ja\n", "utf-8-sig")
    rows.fill("sheet.csv")
    rows.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("Regen?")
    page.get_by_label("The question is in").select_option("Frage")
    page.get_by_label("The answer is in").select_option("Die Antwort")
    expect(page.locator("mark").first).to_have_text(" ja<end>", timeout=LONG)
    press(page, "Train on these rows")
    expect(page.locator("#command")).to_contain_text("--sft_field Frage 'Die Antwort'")
    page.go_back()
    press(page, "look for Another file or folder")
    page.get_by_role("dialog").get_by_text("rows.jsonl").click()
    expect(page.get_by_label("Tokenizer", exact=True)).to_have_value("bytes")  # the base's
    expect(page.locator("mark").first).to_have_text(' {"name": "Ann"}\n<end>')
    press(page, "Train on these rows")

    expect(page.locator(".taken")).to_contain_text(re.compile("base.pth.*rows.jsonl"))
    page.get_by_text("More settings").click()
    page.get_by_label("Rank", exact=True).fill("7")
    expect(page.get_by_role("alert")).to_contain_text("--bone_r 7")
    expect(page.locator(".wrong").get_by_label("Rank", exact=True)).to_be_visible()
    page.get_by_label("Rank", exact=True).fill("32")
    expect(page.locator("#plan")).to_contain_text("fits")
    expect(page.locator("#plan")).to_contain_text("the time is not known")
    expect(page.locator("#command")).to_contain_text("--bone_r 32")


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
    page.get_by_role("link", name="Runs").click()
    expect(page.get_by_role("alert").first).to_contain_text("The page's command was started anew")
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
    now, stop = page.locator(".now"), page.get_by_role("button", name="Stop after this step")
    expect(page.get_by_role("heading", level=1)).to_have_text("Train")
    expect(now).to_contain_text(re.compile("of 8|It trains: step"))
    expect(now).to_contain_text(re.compile(r"It trains: step [\d,]+ of [\d,]+, about .* left\."))
    stop.dblclick()  # the second click does nothing
    expect(now).to_contain_text("Resume goes on from there")
    expect(page.locator("h2 .state")).to_have_text("stopped")
    metrics = folder / "100 % long" / "metrics.jsonl"
    size = metrics.stat().st_size
    press(page, "Resume")
    until = time.monotonic() + LONG / 1000
    while metrics.stat().st_size == size:
        assert time.monotonic() < until
        page.wait_for_timeout(100)
    go(page, "Base")
    go(page, "Train")  # it leads to the run that goes on
    stop.click()
    expect(now).to_contain_text("Resume goes on from there")
    go(page, "Runs")
    page.set_viewport_size({"width": 360, "height": 800})
    run = page.get_by_role("region", name="100 % long")
    expect(run.locator(".now")).to_contain_text("Resume goes on from there")
    listed = page.get_by_role("link", name="100 % long", exact=True)
    assert run.bounding_box()["y"] < listed.bounding_box()["y"]
    page.set_viewport_size({"width": 1200, "height": 900})

    go(page, "Take home")
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Run, or adapter", exact=True).fill("none.safetensors")
    page.get_by_label("Base", exact=True).fill("base.pth")
    page.get_by_label("Merged model", exact=True).fill("x.pth")
    press(page, "Make the file")
    expect(page.locator(".job .state")).to_have_text("failed")
    expect(page.get_by_role("alert")).to_contain_text("none.safetensors")
