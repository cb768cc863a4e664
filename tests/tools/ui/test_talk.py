"""The chat in a real browser, beside models' answers that a test makes up."""

import json
import re

import pytest

from rwkv_peft.inference.settings import Sampling
from tools.ui.pages import go, press

expect = pytest.importorskip("playwright.sync_api", reason="needs the extra test").expect
RUN = {"folder": "out/poet", "state": "done", "modified": 1, "steps": 1, "done": 1, "epochs": 1}
RUN |= {"flags": {"load_model": "base.pth", "tokenizer": "bytes", "ctx_len": "96"}, "files": ["adapter.safetensors"]}
WORDS = ["serve", "--model", "base.pth", "--adapter", "adapter=out/poet/adapter.safetensors", "adapter-2=b.safetensors"]
JOB = {"id": "1", "own": True, "words": WORDS, "began": 1, "state": "running", "code": None, "output": "", "next": 0}
TITLES = ("base", "out/poet", "b")


def test_several_adapters_are_served_beside_a_model(server):
    asked = {"model": "base.pth", "adapters": ["a.safetensors", "b.safetensors"], "weights": "int8"}
    words = server.json(f"/api/jobs/{server.json('/api/chat', asked)['id']}")["words"]
    at = words.index("--adapter")
    assert words[at + 1 : at + 3] == ["adapter=a.safetensors", "adapter-2=b.safetensors"]
    assert words[-2:] == ["--weights", "int8"]


class Models:
    """Stands in for a server of models: its next answers, the bodies of requests, and the models that are opened."""

    def __init__(self, page):
        self.page, self.answers, self.asked, self.opened, self.judged = page, [], [], [], []
        page.route(re.compile(r"/api/jobs\?"), lambda route: route.fulfill(json=[JOB] * bool(self.opened)))
        page.route(re.compile("/api/jobs/1"), lambda route: route.fulfill(json=JOB))
        page.route(re.compile(r"/api/runs\?"), lambda route: route.fulfill(json=[RUN]))
        taken = {"file": "out/poet/adapter.safetensors", "other": None, "note": ""}
        page.route(re.compile("/api/runs/taken"), lambda route: route.fulfill(json=taken))
        names = [{"id": name} for name in ("base", "adapter", "adapter-2")]
        page.route(re.compile("/v1/models"), lambda route: route.fulfill(json={"data": names}))
        page.route(re.compile("/api/chat$"), self.open)
        page.route("**/chat/completions", self.complete)
        page.route("**/v1/feedback", self.judge)

    def open(self, route):
        self.opened.append(route.request.post_data_json)
        route.fulfill(json={"id": "1"})

    def complete(self, route):
        status, end, *deltas = self.answers[0] if len(self.answers) == 1 else self.answers.pop(0)
        self.asked.append(route.request.post_data_json)
        if status != 200:
            return route.fulfill(status=status, json={"error": {"message": deltas[0]}})
        deltas = [{"content": delta} if isinstance(delta, str) else delta for delta in deltas]
        lines = [{"delta": delta} for delta in deltas] + ([{"delta": {}, "finish_reason": end}] if end else [])
        usage = {"choices": [], "usage": {"completion_tokens_details": {"reasoning_tokens": 7}}}
        events = [*({"id": f"c{len(self.asked)}", "choices": [line]} for line in lines), usage]
        body = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        return route.fulfill(content_type="text/event-stream", body=body)

    def judge(self, route):
        self.judged.append(route.request.post_data_json)
        if self.judged[-1].get("text") == " ":
            return route.fulfill(status=400, json={"error": {"message": "the better answer is empty"}})
        route.fulfill(json={})

    def say(self, text):
        self.page.get_by_label("message", exact=True).fill(text)
        self.page.get_by_label("message", exact=True).press("Enter")

    def answer(self, title):
        """The last answer of a model."""
        return self.page.get_by_role("article", name=title, exact=True).last


@pytest.fixture
def models(open_page):
    """A chat that offers to open a model with two adapters."""
    models = Models(open_page())
    go(models.page, "Talk")
    models.page.get_by_label("message", exact=True).wait_for()
    return models


@pytest.fixture
def talk(models):
    """A chat with a model and two adapters that are open."""
    press(models.page, "Open out/poet beside base")
    expect(models.page.get_by_role("log")).to_have_attribute("aria-busy", "false")
    return models


def test_one_click_opens_the_newest_run_on_its_base_and_a_message_is_sent_to_all(talk):
    page = talk.page
    assert talk.opened == [
        {
            "model": "base.pth",
            "adapters": ["out/poet/adapter.safetensors"],
            "state": "",
            "tokenizer": "bytes",
            "weights": "",
        }
    ]
    talk.answers[:] = [(200, "stop", "Hello", " **you**")]
    talk.say("Hi")
    for title in TITLES:
        expect(talk.answer(title).locator(".words")).to_have_text("Hello you")
        expect(talk.answer(title).locator("strong")).to_have_text("you")
    expect(page.get_by_label("message", exact=True)).to_be_focused()
    assert [body["model"] for body in talk.asked] == ["base", "adapter", "adapter-2"]
    assert len({body["seed"] for body in talk.asked}) == 1 and not any("think" in body for body in talk.asked)
    boxes = [talk.answer(title).bounding_box() for title in TITLES]
    assert len({box["y"] for box in boxes}) == 1 and len({box["x"] for box in boxes}) == 3
    page.set_viewport_size({"width": 360, "height": 800})
    boxes = [talk.answer(title).bounding_box() for title in TITLES]
    assert len({box["x"] for box in boxes}) == 1 and page.locator("html").evaluate("page => page.scrollWidth") <= 360
    page.reload()
    expect(talk.answer("b").locator(".words")).to_have_text("Hello you")


def test_a_message_may_be_written_before_a_model_is_open(models):
    models.answers[:], held = [(200, "stop", "Hello")], []
    models.page.route(re.compile("/api/chat$"), lambda route: held.append(route))
    with models.page.expect_request(re.compile("/api/chat$")):
        press(models.page, "Open out/poet beside base")
    models.say("Hi")  # while it is being opened
    models.open(held[0])
    expect(models.answer("out/poet")).to_contain_text("Hello")
    assert len(held) == 1 and models.asked[0]["messages"] == [{"role": "user", "content": "Hi"}]
    sent = {name: models.asked[0][name] for name in ("temperature", "top_p")}
    assert sent == {"temperature": Sampling.temperature, "top_p": Sampling.top_p}  # as generate's chat


def test_the_drawer_is_reached_by_the_keyboard_and_holds_models_thinking_and_sampling(models, folder):
    page = models.page
    page.get_by_role("heading", level=1).evaluate("heading => { heading.tabIndex = -1; heading.focus(); }")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    press(page, "Another adapter")
    expect(page.get_by_label("Adapter 2", exact=True)).to_be_focused()
    page.get_by_label("Adapter 2", exact=True).fill("b.safetensors")
    expect(page.get_by_label("Longest answer", exact=True)).to_have_value("96")  # the rows'
    page.get_by_label("Thinking").select_option("on")
    page.locator(".drawer").get_by_text("More", exact=True).click()
    for label, value in {"Temperature": "0.5", "Top p": "0.25", "Longest answer": "9", "System text": "Rhyme."}.items():
        page.get_by_label(label, exact=True).fill(value)
    press(page, "Open")
    expect(page.get_by_text("open: base, out/poet, b")).to_be_visible()
    thoughts = [{"reasoning_content": text} for text in ("A greeting", ": I greet.")]
    models.answers[:] = [(200, "stop", *thoughts, {"content": "Hello"})]
    models.say("Hi")
    assert models.opened[0]["adapters"] == ["out/poet/adapter.safetensors", "b.safetensors"]
    answer = models.answer("b")
    expect(answer.locator(".words")).to_have_text("Hello")
    expect(answer.get_by_text("A greeting: I greet.")).to_be_hidden()
    answer.get_by_text("thought for about 7 tokens").click()
    expect(answer.get_by_text("A greeting: I greet.")).to_be_visible()
    sent = {"temperature": 0.5, "top_p": 0.25, "max_tokens": 9, "think": "on"}
    assert models.asked[0].items() >= sent.items()
    system = {"role": "system", "content": "Rhyme."}
    assert models.asked[0]["messages"] == [system, {"role": "user", "content": "Hi"}]
    answer.get_by_role("button", name="Add to my rows").click()
    expect(answer.get_by_role("button", name="Added to my rows ✓")).to_be_disabled()
    row = json.loads((folder / "my-rows.jsonl").read_text().splitlines()[-1])
    thoughtful = {"role": "assistant", "content": "Hello", "reasoning_content": "A greeting: I greet."}
    assert row == {"messages": [*models.asked[0]["messages"], thoughtful]}
    page.get_by_label("Scale of b").fill("0.5")
    models.say("And?")
    expect(page.get_by_role("article")).to_have_count(6)
    assert [body.get("adapter_scale") for body in models.asked] == [None] * 5 + [0.5]
    assert models.asked[-1]["messages"][-2:] == [
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "And?"},
    ]
    page.reload()
    expect(page.get_by_label("Longest answer", exact=True)).to_have_value("9")


def test_without_a_model_talk_leads_to_a_base(models):
    page = models.page
    page.route(re.compile(r"/api/runs$|/api/runs\?"), lambda route: route.fulfill(json=[]))
    page.evaluate("localStorage.clear()")  # the page has taken the newest run's base
    page.reload()
    expect(page.locator("main").get_by_role("link", name="Choose a base first")).to_have_attribute("href", "#base")
    expect(page.get_by_label("Temperature", exact=True)).to_be_hidden()
    models.say("Hi")
    expect(page.get_by_role("alert")).to_have_text("Name a model first.")
    expect(page.get_by_label("Model", exact=True)).to_be_focused()
    expect(page.get_by_label("message", exact=True)).to_have_value("Hi")


@pytest.mark.parametrize(("end", "why"), [("length", "cut: it reached the longest"), ("", "cut: the model was closed")])
def test_an_answer_that_is_not_whole_says_so_and_is_no_row(talk, end, why):
    talk.answers[:] = [(200, end, "one two")]
    talk.say("Hi")
    answer, copy = talk.answer("b"), talk.answer("b").get_by_role("button", name="Add to my rows")
    for _ in range(2):
        expect(answer).to_contain_text(why)
        expect(copy).to_be_disabled()
        talk.page.reload()
    talk.answers[:] = [(200, "stop", "one two three")]
    press(talk.page, "Regenerate")
    expect(answer).not_to_contain_text("cut")
    expect(copy).to_be_enabled()
    assert talk.asked[-1]["messages"] == [{"role": "user", "content": "Hi"}]
    assert talk.asked[-1]["seed"] == talk.asked[0]["seed"] + 1
    press(talk.page, "Edit the last")
    expect(talk.page.get_by_label("message", exact=True)).to_have_value("Hi")
    expect(talk.page.get_by_role("article")).to_have_count(0)


def test_answers_have_a_height_and_a_repetition_is_cut(talk):
    """The base goes on without end; what was trained answers well, and is in view."""
    page = talk.page
    page.set_viewport_size({"width": 360, "height": 740})
    talk.answers[:] = [
        (200, "length", "Aye.", *["\ns"] * 500),
        (200, "length", *[f"{n} " for n in range(900)]),
        (200, "stop", "No."),
    ]
    talk.say("Hi")
    for title, words in (("base", "Aye.\ns\ns\ns"), ("b", "No.")):
        expect(talk.answer(title).locator(".words")).to_have_text(words, use_inner_text=True)
    expect(talk.answer("base")).to_contain_text(re.compile(r"cut: the same came \d+ times"))
    long = talk.answer("out/poet").locator(".words")
    expect(long).to_contain_text("899")
    box = long.bounding_box()
    assert (
        box["height"] < 300
        and box["y"] >= 0
        and box["y"] + box["height"] < 740
        and long.evaluate("words => words.scrollHeight > words.clientHeight")
    )
    assert (
        talk.answer("b").bounding_box()["y"] < talk.answer("base").bounding_box()["y"]
    )  # what was trained comes first


def test_an_answer_is_marked_and_rewritten_and_the_chat_goes_on_from_the_better_one(talk):
    talk.answers[:] = [(200, "stop", "Yo"), (200, "stop", "Yo"), (200, "length", "Yo")]
    talk.say("Hi")
    base, poet, cut = map(talk.answer, TITLES)
    expect(cut).to_contain_text("cut")
    expect(cut.get_by_role("button", name="Good")).to_be_disabled()
    base.get_by_role("button", name="Bad").click()
    expect(base.get_by_role("status")).to_have_text("“Bad” is noted in my-feedback.jsonl ✓")
    poet.get_by_role("button", name="Rewrite").click()
    expect(poet.get_by_label("A better answer")).to_have_value("Yo")
    poet.get_by_label("A better answer").fill(" ")
    poet.get_by_role("button", name="This is better").click()
    expect(poet.get_by_role("alert")).to_have_text("the better answer is empty")
    poet.get_by_label("A better answer").fill("Hello")
    poet.get_by_role("button", name="This is better").click()
    expect(poet.locator(".words")).to_have_text("Hello")
    expect(poet.get_by_role("button", name="Good")).to_be_disabled()  # what the model said stands there no more
    ids = [body["id"] for body in talk.judged]
    assert ids[1:] == ids[1:2] * 2 and ids[0] != ids[1]
    assert [{**body, "id": ""} for body in talk.judged[::2]] == [{"id": "", "mark": "bad"}, {"id": "", "text": "Hello"}]
    talk.page.reload()
    expect(talk.answer("out/poet").get_by_role("status")).to_contain_text("“Rewrite” is noted")
    talk.answers[:] = [(200, "stop", "Yes.")]
    talk.say("So?")
    expect(talk.page.get_by_role("article")).to_have_count(6)
    said = [body["messages"][1]["content"] for body in talk.asked[3:] if body["model"] == "adapter"]
    assert said == ["Hello"]


def test_a_message_that_was_refused_is_left_out_of_what_follows(talk):
    talk.answers[:] = [(400, "", "the prompt is too long")]
    talk.say("long")
    expect(talk.answer("base").get_by_role("alert")).to_have_text("the prompt is too long")
    expect(talk.page.get_by_role("button", name="Send")).to_be_visible()
    talk.answers[:] = [(200, "stop", "Yes.")]
    talk.say("short")
    expect(talk.page.locator("article .words", has_text="Yes.")).to_have_count(3)
    assert talk.asked[-1]["messages"] == [{"role": "user", "content": "short"}]
    expect(talk.answer("base").get_by_role("button", name="Add to my rows")).to_be_enabled()


STUCK = """() => {
  const piece = 'data: {"choices": [{"delta": {"content": "one"}}]}\\n\\n', real = window.fetch;
  const begun = () => new ReadableStream({ start: (stream) => stream.enqueue(new TextEncoder().encode(piece)) });
  const stuck = (path) => path.includes("/completions");
  window.fetch = (path, ...rest) => (stuck(path) ? Promise.resolve(new Response(begun())) : real(path, ...rest));
}"""


@pytest.mark.parametrize("why", ["stopped", "cut: the page was left"])
def test_an_answer_that_is_stopped_or_left_is_not_whole(talk, why):
    page = talk.page
    page.evaluate(STUCK)  # an answer that begins, and goes on for ever
    talk.say("Hi")
    expect(talk.answer("base")).to_contain_text("one")
    expect(page.get_by_role("log")).to_have_attribute("aria-busy", "true")
    expect(page.get_by_role("button", name="Send")).to_be_hidden()
    if why == "stopped":
        press(page, "Stop")
    else:
        go(page, "Runs")
        go(page, "Talk")
    expect(talk.answer("base")).to_contain_text(why)
    expect(page.get_by_role("button", name="Add to my rows").first).to_be_disabled()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
