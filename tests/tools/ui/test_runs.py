"""Runs in a real browser: their list, their charts, and their answers as cards."""

import json
import math
import re

import pytest

from tools.ui.pages import go, press

expect = pytest.importorskip("playwright.sync_api", reason="needs the extra test").expect
STEPS = 50_000  # of a run whose metrics are read in several parts
MANY = 60
LONG = " ".join(f"a{number}" for number in range(2000))  # an answer that repeats nothing


def make_run(folder, name, losses):
    """A run that has ended, with a loss at each step and a held-out one at each tenth."""
    (folder / name).mkdir(parents=True)
    (folder / name / "config.json").write_text(json.dumps({"flags": {"load_model": "base.pth"}, "steps": len(losses)}))
    (folder / name / "adapter.safetensors").touch()
    lines = []
    for step, loss in enumerate(losses):
        line = {"step": step, "loss": loss, "lr": 1e-3, "tokens": 8000, "tokens_per_s": 4000.0}
        lines += [line | {"samples": 8 * step, "grad_norm": 0.123456789, "seconds": 2.0}]
        lines += [{"step": step, "val_loss": loss + 0.5}] * (step % 10 == 9)
    (folder / name / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def falling(steps):
    return [2.0 - step / steps for step in range(steps)]


@pytest.fixture(scope="module")
def runs(folder):
    for number in range(MANY):
        make_run(folder, f"sweep/run-{number}", falling(20))
    make_run(folder, "long", falling(STEPS))
    make_run(folder, "steep", [8 * math.exp(-step / 10) + 0.5 + 0.1 * (-1) ** step for step in range(400)])
    return folder


@pytest.fixture
def show(open_page, runs):
    """Open the page of a run."""

    def shown(name, **options):
        page = open_page(**options)
        page.goto(f"{page.url}#runs:{name.replace('/', '%2F')}")
        return page

    return shown


def test_a_long_run_that_is_done_says_so_at_once(show):
    page = show("long")
    expect(page.locator("h2 .state")).to_have_text("done")
    assert page.get_by_role("button", name="Resume").count() == 0
    expect(page.get_by_role("img", name="Chart of loss over steps")).to_be_visible()
    expect(page.get_by_text("loss: 2 at step 1 first, 1 at step 50,000 last, 1 at step 50,000 lowest")).to_be_visible()
    expect(page.get_by_text("Outliers")).to_have_count(0)


def test_many_runs_are_searched_ordered_and_shown(open_page, runs):
    page = open_page()
    go(page, "Runs")
    expect(page.get_by_role("heading", level=1)).to_be_focused()
    press(page, f"Show all {MANY + 2} runs")
    links = page.locator("main .list a[href^='#runs:']")
    expect(links).to_have_count(MANY + 2)
    page.get_by_label("order of runs").select_option("by name")
    assert links.all_inner_texts() == ["long", "steep", *(f"sweep/run-{number}" for number in range(MANY))]
    page.get_by_label("find a run").fill("sweep 59")
    expect(links).to_have_count(1)
    page.evaluate("() => { const link = document.querySelector('main .list a'); link.old = true; link.focus(); }")
    page.wait_for_function("() => !document.querySelector('main .list a').old")  # the list was drawn again
    expect(links.first).to_be_focused()
    go(page, "Take home")
    cards = page.get_by_role("group", name="Runs in this folder").get_by_role("radio")
    expect(cards).to_have_count(8)
    assert page.get_by_role("button", name="Make the file").bounding_box()["y"] < 900
    press(page, f"Show all {MANY + 2}")
    expect(cards).to_have_count(MANY + 2)


def test_compared_runs_have_colours_of_their_own(show):
    page = show("sweep/run-50")
    for number in range(51, 58):
        page.get_by_label(f"compare sweep/run-{number}", exact=True).check()
    labels = page.locator(".u-legend tr").filter(has_text=re.compile(r"run-5\d: loss"))
    expect(labels).to_have_count(8)
    colours = [one.evaluate("row => row.querySelector('.u-marker').style.borderColor") for one in labels.all()]
    assert len(set(colours)) == 8
    held = page.locator(".u-legend tr").filter(has_text=re.compile(r"run-53: held-out"))
    assert held.evaluate("row => row.querySelector('.u-marker').style.borderColor") == colours[3]
    page.get_by_label("compare steep", exact=True).check()
    expect(page.locator(".u-legend").first).to_contain_text("steep: loss, smoothed")


PLOT = """() => {
  const { plot } = document.querySelector(".picture");
  return [plot.data, plot.scales.y.min, plot.scales.y.max];
}"""


def test_a_chart_shows_a_mean_over_a_loss_beside_the_held_out_one_in_a_range_of_most_values(show, runs):
    page = show("steep")
    expect(page.locator(".u-legend").first).to_have_text(re.compile("step.*loss.*loss, smoothed.*held-out loss"))
    (steps, loss, mean, held), low, high = page.evaluate(PLOT)
    assert len(steps) == 400 and sum(value is not None for value in held) == 40
    assert mean[0] == loss[0] and mean[200] == pytest.approx(sum(loss[190:211]) / 21)
    assert low < min(loss) and max(loss[60:]) < high < 2
    told = page.locator(".picture + [aria-live=polite]").first
    expect(told).to_contain_text(
        re.compile(r"^loss: 8\.6 at step 1 first, 0\.4 at step 400 last, 0\.4 at step \d+ lowest")
    )
    expect(told).to_contain_text("held-out loss: ")
    expect(told).to_contain_text("the log scale shows them")
    page.get_by_label("log scale").check()
    expect(told).not_to_contain_text("the log scale shows them")
    page.reload()
    expect(page.get_by_label("log scale")).to_be_checked()
    page.wait_for_function("() => document.querySelector('.picture')?.plot")
    _, low, high = page.evaluate(PLOT)
    assert low <= 0.4 and high >= 8.6
    with page.expect_download() as download:
        page.get_by_role("link", name="metrics.jsonl").click()
    assert (runs / "steep/metrics.jsonl").read_bytes() == download.value.path().read_bytes()


def test_a_chart_is_as_wide_as_its_page(show):
    page = show("steep", width=360)
    page.locator("canvas").first.wait_for()
    page.get_by_text("Learning rate", exact=True).click()
    widths = "() => [...document.querySelectorAll('canvas')].map((one) => one.getBoundingClientRect().width)"
    page.wait_for_function(f"() => ({widths})().every((width) => width > 200 && width < 360)")
    page.set_viewport_size({"width": 768, "height": 900})
    page.wait_for_function(f"() => ({widths})().every((width) => width > 600)")
    assert page.locator("html").evaluate("page => page.scrollWidth") <= 768


def test_only_files_of_the_folder_are_downloaded(server, folder):
    assert server.ask("/api/download?path=rows.jsonl")[1] == (folder / "rows.jsonl").read_text()
    for path in ("..", "", "none", "../../etc/passwd"):
        assert server.ask(f"/api/download?path={path}")[0] == 400


def write(path, *lines):
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def test_a_conversation_with_tools_is_shown_turn_by_turn(show, runs):
    turns = [("assistant", "<tool_call>"), ("tool", "<b>3</b>"), ("assistant", "3 red cups")]
    turns = [{"role": role, "content": words} for role, words in turns]
    line = {"prompt": "Hi", "completion": "3 red cups", "reward": 1.0, "length": 7}
    write(runs / "sweep/run-1/answers.jsonl", line | {"step": 0}, line | {"step": 1, "turns": turns})
    page = show("sweep/run-1")
    card = page.get_by_role("article")
    expect(card.locator(".turn")).to_have_text([f"{turn['role']}{turn['content']}" for turn in turns])
    expect(card.locator("small").first).to_have_text("reward 1 · 7 tokens")
    page.get_by_label("step", exact=True).select_option("sampled at step 1")
    expect(card.locator(".turn")).to_have_text(["answer3 red cups"])


@pytest.mark.parametrize(
    "before, after, deleted, inserted",
    [
        ("Ann has 3 red cups.", "Ann has 5 blue cups, I think.", ["3 red "], ["5 blue ", ", I think"]),
        ("我喜欢红色的杯子", "我喜欢蓝色的杯子", ["红色"], ["蓝色"]),
        ("the same", "the same", [], []),
        ("", "<b>new</b>", [], ["<b>new</b>"]),
        (LONG, LONG.replace("a", "c"), [LONG], [LONG.replace("a", "c")]),
    ],
    ids=["words", "Chinese", "same", "new", "long"],
)
def test_answers_before_and_after_are_cards_with_the_difference_marked(show, runs, before, after, deleted, inserted):
    texts = {"answer": after, "before": before, "after": after}
    row = {"of": "held-out", "prompt": "Q: What?"} | {name: {"text": text} for name, text in texts.items()}
    write(runs / "sweep/run-2/rows.jsonl", row, row | {"answer": {"text": "other"}})
    page = show("sweep/run-2")
    card = page.get_by_role("article").first
    expect(card.locator(".turn")).to_have_text(
        [f"before training{' ✓ as the row' * (before == after)}{before}", f"after training ✓ as the row{after.strip()}"]
    )
    assert card.locator("del").all_text_contents() == deleted and card.locator("ins").all_text_contents() == inserted
    expect(page.get_by_role("article").last.locator(".turn").last).to_have_text("the row's answerother")
    expect(page.get_by_text("rows that it is not trained on: 1 of 2 are answered word for word")).to_be_visible()
