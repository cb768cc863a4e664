"""The page's one path, from an empty folder to a merged model that answers, and its texts in each language."""

import re
from pathlib import Path

import pytest

from rwkv_peft.tools import ui
from tools.ui.pages import ROOT, go, press

expect = pytest.importorskip("playwright.sync_api", reason="needs the extra test").expect
PAGE = Path(ui.__file__).parent / "page"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("empty")


def steps_done(page):
    return page.get_by_role("navigation").get_by_role("img", name="done")


def say(page, text):
    message = page.get_by_label("message", exact=True)
    message.fill(text)
    message.press("Enter")


def test_from_an_empty_folder_to_a_merged_model_that_answers(open_page, folder):
    page = open_page(width=390)
    expect(page.get_by_role("heading", level=1)).to_have_text("Base")
    page.get_by_label("Size", exact=True).select_option(label="0.1B")
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
    expect(page.locator(".figure", has_text="state")).to_contain_text("done")
    assert (folder / "out/mine/adapter.safetensors").exists()
    go(page, "Base")
    expect(page.get_by_role("radio", name="rwkv7-demo.pth")).to_be_checked()
    expect(steps_done(page)).to_have_count(3)

    go(page, "Take home")
    press(page, "Make the file")
    expect(page.get_by_role("link", name="Download out/mine/merged.pth")).to_be_visible()
    expect(steps_done(page)).to_have_count(4)
    press(page, "Talk to it")
    press(page, "Open out/mine/merged")
    say(page, "Ann has 3 red cups. What is there?")
    expect(page.get_by_role("article")).to_contain_text("Aye! 3 red cups")
    expect(steps_done(page)).to_have_count(5)
    assert page.locator("html").evaluate("page => page.scrollWidth") <= 390


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
    starts = tuple(re.findall(r"`([a-z]+\.[\w. ]*)\$\{", code))
    assert [key for key in texts if f'"{key}"' not in code and not key.startswith(starts)] == []
    assert [(name, text) for name, code in sources.items() for text in literals(code)] == []


def test_the_official_bases_are_the_documents_newest():
    listed = ((PAGE / "base.js").read_text(), (ROOT / "docs/start/models.md").read_text())
    page, document = (set(re.findall(r"\brwkv7-g1\w-[\w.-]+\.pth", text)) for text in listed)
    assert page == document and len(page) == 6


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
