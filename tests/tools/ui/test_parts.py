"""Parts of the pages of rows, of training and of release in a real browser."""

import json
import re
import shutil

import pytest

from tools.ui.pages import go, press

expect = pytest.importorskip("playwright.sync_api", reason="needs the extra test").expect


def test_the_rank_goes_to_the_method(open_page, server):
    page = open_page()
    go(page, "Train")
    page.get_by_text("More settings").click()
    page.get_by_label("Rank", exact=True).fill("8")
    command = page.locator("#command")
    expect(command).to_contain_text("--bone_r 8")
    methods = page.get_by_label("Method", exact=True)
    for method in methods.locator("option").evaluate_all("all => all.map((one) => one.value).filter(Boolean)"):
        methods.select_option(method)
        expect(command).to_contain_text(f"--peft {method}")
        given = command.text_content()
        assert ("--bone_r 8" in given) == (method == "bone")
        assert ("""--peft_config '{"r":8}'""" in given) == (method not in ("bone", "none"))
    assert page.get_by_label("Rank", exact=True).is_disabled()


def test_settings_are_named_found_and_have_their_defaults(open_page, folder):
    page = open_page()
    go(page, "Train")
    page.get_by_text("More settings").click()
    texts = page.locator(".help, option, label, summary").all_text_contents()
    assert len(texts) > 200 and not [text for text in texts if re.search("--|…$|PREFIX.idx", text)]
    assert not [name for name in page.locator("label, summary").all_text_contents() if "_" in name]
    defaults = {"Rank": "64", "Learning rate": "auto", "Weight decay": "0.0", "Validation every": "0"}
    for label, default in defaults.items():
        assert page.get_by_label(label, exact=True).get_attribute("placeholder") == default
    find = page.get_by_label("find a setting")
    find.fill("weight decay")
    expect(page.get_by_label("Weight decay", exact=True)).to_be_visible()
    find.fill("rows step")
    expect(page.get_by_label("Rows a step", exact=True)).to_be_visible()
    expect(page.get_by_label("Weight decay", exact=True)).to_be_hidden()
    missing = page.get_by_text("No setting has all of these words")
    for words in ("batch size", "gradient accumulation", "scheduler", "lora alpha"):
        find.fill(words)
        expect(missing).to_be_hidden()
    find.fill("no such words")
    expect(missing).to_be_visible()


def test_how_many_models_merge_when_saved_writes_is_said(open_page, folder):
    page = open_page()
    go(page, "Train")
    page.get_by_text("More settings").click()
    given = {"Base": "base.pth", "Rows": "rows.jsonl", "Tokenizer": "bytes", "Times through the rows": "4"}
    for label, value in given.items():
        page.get_by_label(label, exact=True).fill(value)
    page.get_by_label("Merge when saved", exact=True).check()
    expect(page.locator("#plan")).to_contain_text("“Merge when saved” writes 5 merged models")
    press(page, "Save at the end only")
    expect(page.locator("#command")).to_contain_text("--epoch_save 0")
    expect(page.locator("#plan")).to_contain_text("“Merge when saved” writes 2 merged models")


def test_memory_is_shown_at_once_and_the_checks_of_start_come_after(open_page):
    page, checks = open_page(), []
    page.route("**/api/check", lambda route: route.continue_() if checks else checks.append(route))  # one waits
    go(page, "Train")
    page.get_by_text("More settings").click()
    for label, value in {"Base": "base.pth", "Rows": "none.jsonl", "Tokenizer": "bytes"}.items():
        page.get_by_label(label, exact=True).fill(value)
    expect(page.locator("#plan")).to_contain_text("fits")
    expect(page.get_by_text("are being checked as Start does")).to_be_visible()
    expect(page.get_by_role("alert")).to_have_count(0)
    checks[0].continue_()
    expect(page.get_by_role("alert")).to_contain_text("none.jsonl: no such file")
    expect(page.get_by_text("are being checked as Start does")).to_be_hidden()
    expect(page.locator("#plan")).to_contain_text("fits")


def test_a_file_that_is_dropped_beside_its_field_is_taken(open_page, folder):
    page = open_page()
    sent = []
    page.on("request", lambda request: sent.append(request) if "/api/files?" in request.url else None)

    def drop(name, size=1):
        script = """([name, size]) => {
          const all = new DataTransfer();
          all.items.add(new File(["a".repeat(size)], name));
          return all;
        }"""
        data = page.evaluate_handle(script, [name, size])
        page.get_by_role("heading", level=1).dispatch_event("drop", {"dataTransfer": data})

    go(page, "Rows")
    drop("large.jsonl", 20_000_000)
    expect(page.get_by_label("Another file or folder", exact=True)).to_have_value("large.jsonl")
    assert (folder / "large.jsonl").stat().st_size == 20_000_000
    assert len([request for request in sent if request.method == "POST"]) <= 5
    go(page, "Base")
    drop("mine.pth")
    expect(page.get_by_label("Another file", exact=True)).to_have_value("mine.pth")
    go(page, "Train")
    page.get_by_text("More settings").click()
    drop("mine.csv")
    expect(page.get_by_label("Rows", exact=True)).to_have_value("mine.csv")


def test_a_gguf_has_the_type_that_is_chosen(open_page):
    page, asked = open_page(), []
    go(page, "Take home")

    def refuse(route):
        asked.append(route.request.post_data_json["words"])
        route.fulfill(status=400, json={"error": {"message": "no"}})

    page.route("**/api/jobs", refuse)
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Run, or adapter", exact=True).fill("rwkv.pth")  # which needs no merge
    page.get_by_label("Merged model", exact=True).fill("x.pth")
    for form, kind, words in (("GGUF", "q8_0", ["x.gguf", "--gguf_type", "q8_0"]), ("Ai00", None, ["x.st"])):
        page.get_by_role("radio", name=form).check()
        kind and page.get_by_label("Numbers of the GGUF").select_option(kind)
        press(page, "Make the file")
        expect(page.get_by_role("alert")).to_have_text("no")
        assert asked.pop() == ["convert", "x.pth", *words]
    expect(page.get_by_label("Numbers of the GGUF")).to_be_hidden()


def test_take_home_offers_what_this_installation_can_make(open_page):
    page = open_page()

    def without(route):
        route.fulfill(json=route.fetch().json() | {"missing": ["gguf"]})

    page.route(re.compile("/api/about"), without)
    page.reload()
    go(page, "Take home")
    expect(page.get_by_role("radio", name="GGUF")).to_be_disabled()
    expect(page.get_by_text("pip install gguf")).to_be_visible()
    page.unroute(re.compile("/api/about"))
    page.reload()
    expect(page.get_by_role("radio", name="GGUF")).to_be_enabled()


def test_rows_proposes_the_newest_file_that_can_be_read_and_errors_are_sentences(open_page, folder):
    for name, text in {
        "new.jsonl": '{"text": "new"}\n',
        "odd.jsonl": '{"odd": 1}\n',
        "broken.jsonl": '{"text": "a\n',
    }.items():
        (folder / name).write_text(text)
    page = open_page()
    go(page, "Rows")
    expect(page.locator("mark").first).to_contain_text("new")
    expect(page.get_by_role("radio", name="new.jsonl")).to_be_checked()
    expect(page.get_by_role("alert")).to_have_count(0)
    page.get_by_role("radio", name="broken.jsonl").check()
    expect(page.get_by_role("alert")).to_contain_text("Line 1 is not whole")
    expect(page.get_by_text("not JSON")).to_be_hidden()
    page.get_by_role("radio", name="odd.jsonl").check()
    expect(page.get_by_role("alert")).to_contain_text("It is not plain where the questions and the answers are.")
    expect(page.get_by_label("The answer is in")).to_contain_text("odd")
    (folder / "gb.csv").write_text("问题,答案\n下雨了吗,没有\n", "gb18030")
    page.get_by_role("textbox", name="Another file or folder").fill("gb.csv")
    page.get_by_role("textbox", name="Another file or folder").press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("How its letters are stored is not certain.")
    page.get_by_label("Encoding", exact=True).fill("gb18030")
    press(page, "Show")
    expect(page.locator("mark", has_text="没有").first).to_be_visible()
    for name in ("new.jsonl", "odd.jsonl", "broken.jsonl", "gb.csv"):
        (folder / name).unlink()


ODD = (
    *(
        {"query": "Q", "response": " "},
        {"messages": [{"role": "user", "content": "Q"}]},
        {"text": "User: Q\n\nAssistant: A"},
    ),
    {"messages": [{"role": "assistant", "content": "A"}, {"role": "user", "content": "Q"}]},
    *({"query": "Function output:\n4", "response": "A"}, {"query": "Q<|im_start|>", "response": "A", "title": "T"}),
    *({"query": "R", "response": "B"}, {"query": "R", "response": "B"}, {"query": [1]}),
)


def test_notes_of_the_reader_are_sentences_in_the_language_of_the_page(open_page, folder):
    (folder / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ODD))
    page = open_page()
    go(page, "Rows")
    page.get_by_role("textbox", name="Another file or folder").fill("odd.jsonl")
    page.get_by_role("textbox", name="Another file or folder").press("Enter")
    expect(page.get_by_text("Rows with an empty answer: 1. They teach the model to say nothing.")).to_be_visible()
    page.get_by_label("Language").select_option("zh")
    expect(page.get_by_text("有 1 条的回答是空的，模型会学成什么都不说。")).to_be_visible()
    notes = [text for text in page.locator(".note:visible").all_text_contents() if text]
    assert not [text for text in notes if "--" in text or re.search("[A-Za-z]{2,} [A-Za-z]{2,}", text)]
    # empty, unanswered, unfinished, repeated, turns, result, marks, unread
    assert len([text for text in notes if re.search(r"：?1|有 1 条|im_start|title", text)]) >= 8
    page.get_by_text("读取程序的原话").click()
    expect(page.get_by_text("note: 1 row with an empty answer, which teaches")).to_be_visible()
    page.get_by_label("语言").select_option("en")
    (folder / "odd.jsonl").unlink()


WAYS = {  # a file's rows, the menu and its option or the button by which they are read, and the words of the command
    "talk.txt": (
        "1.1.24, 8:00 - Ada: Rain?\n1.1.24, 8:01 - Bo: No.\n",
        ("Whose words are learned", "Bo"),
        "--sft_as Bo",
        "No.",
    ),
    "think.jsonl": (
        '{"query": "Rain?", "response": "No.", "reasoning": "It is dry."}\n',
        "Thoughts are learned, too",
        "--sft_think on",
        "It is dry.",
    ),
    "two.csv": (
        "problem,solution,Final answer\nRain?,Dry.,No.\n",
        "Question: problem, answer: Final answer",
        "--sft_field problem 'Final answer'",
        "No.",
    ),
    "turns.jsonl": (
        '{"text": "Human: Rain?\\nAssistant: No."}\n',
        "The turns in its texts are a chat",
        "--turns_in_text auto",
        "No.",
    ),
    "stars.txt": ("One.\n***\nTwo.\n", "Cut the text at lines of ***", "--document_end stars", "One."),
}


def test_ways_to_read_rows_are_menus_and_buttons_and_each_is_a_flag_of_the_training(open_page, folder):
    page = open_page()
    rows = page.get_by_role("textbox", name="Another file or folder")
    for name, (content, way, words, learned) in WAYS.items():
        (folder / name).write_text(content)
        go(page, "Rows")
        rows.fill(name)
        rows.press("Enter")
        if isinstance(way, tuple):
            expect(page.get_by_role("alert")).to_contain_text("It is a dialogue of people.")
            page.get_by_label(way[0]).select_option(way[1])
        else:
            press(page, way)
            expect(page.get_by_role("button", name=way, exact=True)).to_have_count(0)
        expect(page.locator("mark", has_text=learned).first).to_be_visible()
        press(page, "Train on these rows")
        expect(page.locator("#command")).to_contain_text(words)
        given = page.locator("#command").text_content()
        assert sum(f"{other.split()[0]} " in given for _, _, other, _ in WAYS.values()) == 1
        (folder / name).unlink()


def test_a_second_browser_begins_with_what_the_newest_run_used(open_page, folder):
    page = open_page()  # before there is a run
    flags = {"load_model": "base.pth", "data_file": ["my rows.jsonl", "b.jsonl"], "tokenizer": "bytes", "bone_r": "16"}
    (folder / "used").mkdir()
    settings = {"flags": flags | {"proj_dir": "used", "merge_on_save": True}, "steps": 1}
    (folder / "used/config.json").write_text(json.dumps(settings))
    (folder / "used/metrics.jsonl").write_text('{"step": 0, "loss": 1}\n')
    go(page, "Train")
    words = "train --load_model base.pth --data_file 'my rows.jsonl' b.jsonl --data_type sft --proj_dir out/mine"
    expect(page.locator("#command")).to_contain_text(words)
    expect(page.locator("#command")).to_contain_text("--tokenizer bytes --bone_r 16")
    expect(page.locator("#command")).to_contain_text("--merge_on_save")
    shutil.rmtree(folder / "used")
