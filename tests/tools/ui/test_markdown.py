"""The Markdown of answers: what is shown of it, and that no text takes more time than its length explains."""

import pytest

from tools.ui.pages import LONG

SHOW = """async ([texts, ended]) => {
  const { showMarkdown } = await import("/page/markdown.js");
  window.shown = null;
  setTimeout(() => {
    const place = document.createElement("div");
    for (const text of texts) showMarkdown(place, text, ended);
    window.shown = [place.innerHTML, place.textContent];
  });
}"""
TEXTS = {
    "a **b** *c* _d_ ~~e~~ ***f*** snake_case_name 2 * 3 * 4": "<p>a <strong>b</strong> <em>c</em> <em>d</em> "
    "<del>e</del> <strong><em>f</em></strong> snake_case_name 2 * 3 * 4</p>",
    "**标题：**内容 **a *b** c*": "<p><strong>标题：</strong>内容 <strong>a *b</strong> c*</p>",
    "`x * y` ``a ` b`` `open \\*no\\* \\(x_1\\)": "<p><code>x * y</code> <code>a ` b</code> `open *no* \\(x_1\\)</p>",
    "![p](https://x/p.png) [q](javascript:1) [r] (s) <b>t</b>": "<p>![p](https://x/p.png) [q](javascript:1) [r] (s) "
    "&lt;b&gt;t&lt;/b&gt;</p>",
    r"$$a_i * b_i$$ \(c_1 * d_1, \, e_1 * f_1\) and *g* $$ \( *h*": r"<p>$$a_i * b_i$$ "
    r"\(c_1 * d_1, \, e_1 * f_1\) and <em>g</em> $$ \( <em>h</em></p>",
    "So:\n\\[\n- a_i\n+ *b*\n\\] *c*\nd\n\n$$\n- a": "<p>So:</p><p>\\[\n- a_i\n+ *b*\n\\] <em>c</em>"
    "</p><p>d</p><p>$$\n- a</p>",
    "# A #\ntext\n---\n> q\n> - a\n>   b": "<h3>A</h3><p>text</p><hr><blockquote><p>q</p><ul><li><p>a\nb</p></li></ul>"
    "</blockquote>",
    "Do:\n1. a\n   - b\n2. c\n\n   d\n\n3) e": '<p>Do:</p><ol start="1"><li><p>a</p><ul><li><p>b</p></li></ul></li>'
    "<li><p>c</p><p>d</p></li><li><p>e</p></li></ol>",
    "- [ ] a\n- [x] b": "<ul><li><p>☐ a</p></li><li><p>☑ b</p></li></ul>",
    "| a | b \\| c |\n|--|:-:|\n| 1 | *2* |\nd": '<div class="scroll"><table><tr><th>a</th><th>b | c</th></tr>'
    "<tr><td>1</td><td><em>2</em></td></tr></table></div><p>d</p>",
    "```py\n*a*\n\n# no\n```\nb": '<div class="code"><pre tabindex="0" aria-label="py">*a*\n\n# no</pre>'
    '<button type="button">Copy</button></div><p>b</p>',
}
LENGTH = 30_000  # characters; a reader whose time grows with their square takes minutes
PIECES = (
    "*a_",
    "\\(a",
    "$$a ",
    "\n\\[a",
    "**a __",
    "[a](",
    "![a",
    "> ",
    "- a ",
    "`a``",
    "a`",
    "_*a~~",
    "|a",
    "1. a\n",
    "  - a\n",
    "](a ",
)


@pytest.fixture(scope="module")
def show(browser, server):
    page = browser.new_page()
    page.goto(server.url)

    def shown(*texts, ended=True):
        page.evaluate(SHOW, [texts, ended])
        return page.wait_for_function("window.shown", timeout=LONG).json_value()

    yield shown
    page.close()


@pytest.mark.parametrize("text", TEXTS)
def test_marks_become_elements_and_html_is_text(show, text):
    assert show(text)[0] == TEXTS[text]


def test_links_lead_to_the_web(show):
    html, text = show('[a *b*](https://x.org/y_(z) "t") <https://z.org>, 见https://w.org/a_b_c. src="https://v.org"')
    assert html.count("<a ") == 3 and text == 'a b https://z.org, 见https://w.org/a_b_c. src="https://v.org"'
    for address in ("https://x.org/y_(z)", "https://z.org", "https://w.org/a_b_c"):
        assert f'<a href="{address}" title="{address}" target="_blank" rel="noopener noreferrer">' in html


def test_a_text_that_grows_is_shown_as_it_is_at_once(show):
    text = "\n\n".join(TEXTS)
    grown = [text[:end] for end in range(1, len(text) + 1)]
    assert show(*grown, ended=False) == show(text)


@pytest.mark.parametrize("piece", PIECES)
def test_no_text_takes_longer_than_its_length_explains(show, piece):
    text = piece * (LENGTH // len(piece))
    assert show(text)[1].count("a") >= text.count("a")
