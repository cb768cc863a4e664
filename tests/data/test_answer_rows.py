"""Rows of pairs, labelled answers, prompts and contexts: their layouts, which tokens count, and their samples."""

import pytest
import torch

from data.documents import EARLIER, GOOD, USER, marked
from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.batches import EvalBatches, TrainBatches
from rwkv_peft.data.encoding import LAYOUTS
from rwkv_peft.data.layouts import RowLayout
from rwkv_peft.data.report import show_samples
from rwkv_peft.data.sources import build_samples, split_samples
from rwkv_peft.data.tokenizer import BytesTokenizer
from rwkv_peft.evals.questions import rows_of

BAD = {"role": "assistant", "content": "No."}
SYSTEM = {"role": "system", "content": "Be brief."}
PROMPT = "User: Hi?\n\nAssistant:"
LONGER, BRIEF = f"User: A?\n\nAssistant: B.\n\n{PROMPT}", f"System: Be brief.\n\n{PROMPT}"
INSTRUCTION = "Instruction: Hi?\n\nInput: x\n\nResponse:"
SHARED = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]
CHAT = "\n\nHuman: A?\n\nAssistant: B.\n\nHuman: Hi?\n\nAssistant: "
TWO, TURNS, DIALOGUES = (
    {"chosen": better, "rejected": worse}
    for better, worse in (("Yes.", "No."), ([GOOD], [BAD]), (f"{CHAT}Yes.", f"{CHAT}No."))
)
WHOLE = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
OPENAI = {"preferred_output": [GOOD], "non_preferred_output": [BAD]}

# (a row's fields, the text before its answers, named fields)
PAIRS = [
    ({"query": "Hi?", **TWO}, PROMPT),
    ({"question": "Hi?", "system": "", **TWO}, PROMPT),
    ({"instruction": "Hi?", "input": "x", **TWO}, INSTRUCTION),
    ({"prompt": PROMPT, "chosen": " Yes.", "rejected": " No."}, PROMPT),
    ({"prompt": [USER], **TURNS}, PROMPT),
    ({"prompt": "Hi?", **WHOLE}, PROMPT),
    ({"prompt": "Hi?", **TURNS}, PROMPT),
    (WHOLE, PROMPT),
    ({"prompt": "Hi?", "messages": [USER, GOOD], **WHOLE}, PROMPT),
    ({"messages": [USER], **TWO}, PROMPT),
    ({"messages": [*EARLIER, USER], **TURNS}, LONGER),
    ({"input": {"messages": [USER]}, **OPENAI}, PROMPT),
    ({"prompt": "Hi?", **OPENAI}, PROMPT),
    ({"chosen_messages": [USER, GOOD], "rejected_messages": [USER, BAD]}, PROMPT),
    ({"conversation": [{"human": "A?", "assistant": "B."}, USER], **TWO}, LONGER),
    ({"conversations": SHARED[:1], "chosen": SHARED[1], "rejected": {"from": "gpt", "value": "No."}}, PROMPT),
    (DIALOGUES, LONGER),
    ({"question": "Hi?", "system": "Be brief.", **TWO}, BRIEF),
    ({"instruction": "Hi?", "input": "x", "system": "Be brief.", **TWO}, f"System: Be brief.\n\n{INSTRUCTION}"),
    ({"prompt": "Hi?", "system_prompt": "Be brief.", **TURNS}, BRIEF),
    ({"messages": [SYSTEM, USER], "system": "Be brief.", **TURNS}, BRIEF),
    ({"prompt": "Hi?", "system": "Be brief.", **TWO}, BRIEF, ("prompt", "chosen", "rejected")),
    ({"q": "Hi?", "a": "Yes.", "b": "No."}, PROMPT, ("q", "a", "b")),
]
LABELS = [
    ({"query": "Hi?", "response": "Yes."}, PROMPT),
    ({"question": "Hi?", "answer": "Yes."}, PROMPT),
    ({"prompt": PROMPT, "completion": " Yes."}, PROMPT),
    ({"instruction": "Hi?", "input": "x", "output": "Yes."}, INSTRUCTION),
    ({"prompt": [USER], "completion": [GOOD]}, PROMPT),
    ({"prompt": "Hi?", "completion": [GOOD]}, PROMPT),
    ({"messages": [USER], "completion": "Yes."}, PROMPT),
    ({"messages": [USER, GOOD]}, PROMPT),
    ({"conversations": [USER, GOOD], "system": "Be brief."}, BRIEF),
    ({"messages": [*EARLIER, USER, GOOD]}, LONGER),
    ({"prompt": [*EARLIER, USER], "completion": [GOOD]}, LONGER),
    ({"q": "Hi?", "a": "Yes."}, PROMPT, ("q", "a", "label")),
]
PROMPTS = [
    *((row, before) for row, before, *_ in LABELS[:4] + LABELS[7:10]),
    ({"conversations": SHARED}, PROMPT),
    ({"messages": [USER]}, PROMPT),
    ({"prompt": [USER]}, PROMPT),
    ({"question": "Hi?", "system": "Be brief."}, BRIEF),
    ({"problem": "Hi?", "answer": "4"}, PROMPT, ("problem",)),
    ({"prompt": "Hi?", "answer": 4, "text": "not read"}, "Hi?"),
]
CONTEXTS = [
    *LABELS[:4],
    ({"query": "Hi?", "answer": "Yes."}, PROMPT),
    ({"question": "Hi?", "answer": "Yes.", "text": "Hi"}, PROMPT),
    ({"prompt": "Hi?", "answer": " Yes."}, "Hi?"),
    ({"messages": [USER, GOOD]}, PROMPT),
    ({"q": "Hi?", "a": "Yes."}, PROMPT, ("context", "q", "a")),
]
KINDS = {"pairs": PAIRS, "labels": LABELS, "prompts": PROMPTS, "contexts": CONTEXTS}
BESIDE = {"labels": {"label": True}, "contexts": {"context": " It is so.\n"}}


def laid_out(kind, row, fields=(), think=""):
    """The documents of a row, with [[ ]] around the parts that count."""
    return [marked(document) for document in LAYOUTS[kind](RowLayout(think, fields=fields), row)]


@pytest.mark.parametrize("kind, form", [(kind, form) for kind, forms in KINDS.items() for form in forms])
def test_every_form_of_row(kind, form):
    row, before, *fields = form
    yes, no = (f"{before}[[ {answer}]]" for answer in ("Yes.", "No."))
    due = {"pairs": [yes, no], "labels": [yes], "prompts": [before], "contexts": ["It is so.\n\n", yes]}
    assert laid_out(kind, row | BESIDE.get(kind, {}), *fields) == due[kind]


@pytest.mark.parametrize("kind, answers", [("pairs", 2), ("labels", 1), ("prompts", 0), ("contexts", 1)])
def test_thinking_opens_every_answer(kind, answers):
    row = {"pairs": {"query": "Hi?", **TWO}}.get(kind, {"query": "Hi?", "response": "Yes.", **BESIDE.get(kind, {})})
    due = [f"{PROMPT} <think></think[[>\n{answer}]]" for answer in ("Yes.", "No.")[:answers]]
    assert laid_out(kind, row, think="off")[-1 - (answers == 2) :] == (due or [f"{PROMPT} <think></think"])
    if kind == "prompts":
        assert laid_out(kind, row, think="on") == [f"{PROMPT} <think"]


@pytest.mark.parametrize(
    "kind, row, words",
    [
        ("pairs", [1], "a row is a list, not an object"),
        ("pairs", {"prompt": "Hi?", "chosen": "Yes."}, "the fields prompt 'Hi.', chosen 'Yes.'; pairs are chosen and"),
        ("pairs", TWO, "a row has no prompt, only chosen 'Yes.', rejected 'No.'"),
        (
            "pairs",
            {"prompt": [USER], "chosen": True, "rejected": "No."},
            "field 'chosen' holds true or false, not text",
        ),
        ("pairs", {"query": "Hi?", "chosen": "Yes.", "rejected": None}, "field 'rejected' holds null, not text"),
        ("pairs", {"query": "Hi?", "response": "Yes."}, "rows of one answer are for --data_type sft"),
        ("pairs", {"messages": [USER, GOOD], **TWO}, "end in one of the assistant's; leave it out"),
        ("pairs", {"prompt": "Hi?", **TWO, "system": "Be."}, "a system text beside its prompt"),
        ("pairs", {"query": {}, **TWO}, "field 'query' holds an object, not text"),
        ("labels", [1], "a row is a list, not an object"),
        ("labels", {"query": "Hi?", "response": "Yes."}, "rows without a label are for --data_type sft; name"),
        ("labels", {"query": "Hi?", "response": "Yes.", "label": 1}, "field 'label' holds 1; a label is true for"),
        ("labels", {"query": "Hi?", "response": "Yes.", "label": "yes"}, "field 'label' holds 'yes'; a label is true"),
        ("labels", {"query": "Hi?", "label": True}, "a row has the fields query"),
        ("labels", {"query": "Hi?", "response": ["a"], "label": True}, "field 'response' holds a list, not text"),
        ("labels", {"messages": [USER], "label": True}, "are to end in one of the assistant's"),
        ("labels", {"messages": [USER, GOOD, USER], "label": True}, "are to end in one of the assistant's"),
        ("labels", {"messages": [], "label": True}, "are to end in one of the assistant's"),
        ("prompts", "Hi?", "a row is a text, not an object with fields: a prompt, query"),
        ("prompts", {"problem": "Hi?"}, "the fields problem 'Hi.'; prompts are a prompt, query, question"),
        ("prompts", {"prompt": " "}, "the prompt is empty; write one"),
        ("prompts", {"prompt": {}}, "field 'prompt' holds an object, not text"),
        ("contexts", "Hi?", "a row is a text, not an object with fields: context beside a question"),
        ("contexts", {"question": "Hi?", "answer": "Yes."}, "field 'context' is missing; the row has question 'Hi.'"),
        ("contexts", {"context": "It."}, "the fields context 'It.'; rows with contexts have context beside a question"),
        ("contexts", {"context": "It.", "question": "Hi?"}, "context 'It.', question 'Hi.'; rows with contexts have"),
        ("contexts", {"context": " ", "question": "Hi?", "answer": "A"}, "the context is empty; write one, or leave"),
        ("contexts", {"context": "It.", "question": "Hi?", "answer": " "}, "the answer is empty; write one"),
        ("contexts", {"context": "It.", "prompt": "", "completion": "A"}, "the question is empty; write one"),
        ("contexts", {"context": [3], "question": "Hi?", "answer": "A"}, "field 'context' holds a list, not text"),
        ("contexts", {"context": "It.", "question": "Hi?", "answer": ["A"]}, "field 'answer' holds a list, not text"),
    ],
)
def test_rows_that_cannot_be_learned_from_are_refused_or_left_out(answers, kind, row, words):
    made = answers(kind)
    with pytest.raises(UserError, match=f"line 4: .*{words}"):
        build_samples(made([*rows(kind, 3), row]), 257)
    samples = build_samples(made([*rows(kind, 3), row], skip_bad_rows=True), 257)
    assert len(samples) == 3 and any("1 bad row left out" in note for note in samples.notes)


def rows(kind, number):
    made = {
        "pairs": lambda n: {"prompt": f"{n}?", "chosen": f"{n} is fine", "rejected": "no" * (n + 1)},
        "labels": lambda n: {"prompt": f"{n}?", "completion": "yn"[n % 2] * (n + 1), "label": n % 2 == 0},
        "prompts": lambda n: {"prompt": f"{n}:", "answer": n, "word": "ä"},
        "contexts": lambda n: {"context": "Bo is 3. " * (n + 1), "question": "Bo?" * (n + 1), "answer": "3"},
    }[kind]
    return [made(n) for n in range(number)]


@pytest.mark.parametrize("kind, other", [("pairs", ("prompt", "rejected", "chosen")), ("labels", None)])
def test_fields_that_are_named_are_three(answers, kind, other):
    made = rows(kind, 2)
    with pytest.raises(UserError, match="(pairs|labelled rows) have three fields, the prompt"):
        build_samples(answers(kind)(made, sft_field=tuple(made[0])[:2]), 257)
    assert len(build_samples(answers(kind)(made, sft_field=other or tuple(made[0])), 257)) == 2


EMPTY = "1 row without a prompt or an answer, left out"


@pytest.mark.parametrize(
    "kind, row, note",
    [
        ("pairs", {"prompt": "", "chosen": "a", "rejected": "b"}, EMPTY),
        ("pairs", {"prompt": "", "chosen": "a", "rejected": ""}, EMPTY),
        ("pairs", {"query": "Hi?", "chosen": "", "rejected": "b"}, EMPTY),
        ("pairs", {"query": "Hi?", "chosen": "", "rejected": ""}, EMPTY),
        ("pairs", {"chosen": [USER, GOOD], "rejected": [USER, GOOD, USER, BAD]}, EMPTY),
        ("pairs", {"prompt": "?", "chosen": "a", "rejected": "a"}, "1 pair of equal answers left out"),
        ("pairs", {"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "1 pair of equal answers left out"),
        ("labels", {"prompt": "", "completion": "a", "label": True}, EMPTY),
        ("labels", {"query": "Hi?", "response": "", "label": True}, EMPTY),
    ],
)
def test_rows_without_anything_to_compare_are_left_out_and_counted(answers, kind, row, note):
    samples = build_samples(answers(kind)([*rows(kind, 3), row]), 257)
    assert len(samples) == 3 and note in samples.notes
    with pytest.raises(UserError, match=f"no document to write: {note}"):
        build_samples(answers(kind)([row]), 257)


def words(document):
    """(the prompt, what counts) of a document, in words."""
    tokens, mask = document
    first = int(mask.nonzero()[0]) + 1
    return tuple(BytesTokenizer().decode(part.tolist()).rstrip("\0") for part in (tokens[:first], tokens[first:-1]))


def text(tokens):
    return BytesTokenizer().decode(tokens.tolist())


def test_samples_are_pairs_whose_answers_count(answers):
    data = answers("pairs")
    samples = build_samples(data(rows("pairs", 5), seed=None), 257)
    assert len(samples) == 5 and samples.count(3) == 1 and "5 pairs of answers" in samples.notes
    for n in range(5):
        assert [words(document)[1] for document in samples[n]] == [f"{n} is fine", "no" * (n + 1)]
    assert "sample 1, document 2" in show_samples(samples, 1, BytesTokenizer())
    train, held_out = split_samples(data(rows("pairs", 5)), 257, 0.4)
    shown = [words(part[n][0])[1] for part in (train, held_out) for n in range(len(part))]
    assert sorted(shown) == [f"{n} is fine" for n in range(5)] and len(held_out) == 2


@pytest.mark.parametrize("kind", ["pairs", "labels"])
def test_a_batch_is_one_row_of_documents_and_a_step_counts_their_samples(answers, kind):
    samples = build_samples(answers(kind)(rows(kind, 5), seed=None), 257)
    batch = next(iter(TrainBatches(samples, micro_bsz=2, accumulate=2, read_ahead=0)))
    assert batch["tokens"].shape[0] == 1 and len(batch["cu_seqlens"]) == 5 and batch["step_count"] == 4
    assert batch["mask"].dtype == torch.bool
    *_, last = EvalBatches(samples, 2)
    assert len(last["cu_seqlens"]) == 5, "of which the last two fill up"
    if kind == "labels":
        assert batch["labels"].tolist() == [True, False, False, True]  # a mismatched answer has its own row's
        assert batch["mask"].sum() == 2 + 3 + 3 + 4 and last["mask"].sum() == 6 + 2


def test_both_answers_lose_the_same_front_of_a_prompt_that_is_too_long(answers):
    row = {"prompt": "0123456789", "chosen": "ab", "rejected": "abcdef"}
    (better, _), (worse, _) = build_samples(answers("pairs")([row], ctx_len=9), 257)[0]
    assert [text(part[:-1]) for part in (better, worse)] == ["789ab", "789abcdef"]
    with pytest.raises(UserError, match="no document to write"):
        build_samples(answers("pairs")([row], ctx_len=9, sft_long="skip"), 257)


def test_both_answer_the_same_prompt_where_one_of_them_thinks(answers):
    made = [{"query": "Hi?", "chosen": "<think>Hm.</think>Yes.", "rejected": n} for n in ("No.", "<think>-</think>No.")]
    samples = build_samples(answers("pairs")(made, seed=None, sft_think="on"), 257)
    assert "1 row with thinking, 1 without (<think></think)" in samples.notes
    plain, thought = ([text(tokens) for tokens, _ in samples[n]] for n in range(2))
    assert all(" <think></think>\n" in one for one in plain)
    assert "<think>Hm.</think>" in thought[0] and "<think>-</think>" in thought[1]


def test_each_labelled_row_stands_beside_its_prompt_with_the_next_rows_answer(answers):
    samples = build_samples(answers("labels")(rows("labels", 4), seed=None), 257)
    assert len(samples) == 4 and samples.count(3) == 1 and "4 labelled answers" in samples.notes
    due = ["y", "nn", "yyy", "nnnn"]
    for n in range(8):
        own, mismatched = samples[n]
        assert words(own) == (f"{n % 4}?", due[n % 4]) and words(mismatched) == (f"{n % 4}?", due[(n + 1) % 4])
        assert own[1].max() == 1 + n % 2, "1 desirable, 2 undesirable"
    shuffled = build_samples(answers("labels")(rows("labels", 4)), 257)
    assert all(words(own)[1] != words(other)[1] for own, other in (shuffled[n] for n in range(40)))
    shown = show_samples(samples, 2, BytesTokenizer())
    assert "sample 1, document 1: 4 tokens, 2 count" in shown and "sample 2, document 1, undesirable: 5 tokens" in shown
    compared = rows_of("training", samples, 4)  # before and after training
    assert [BytesTokenizer().decode(list(row.answer[:-1])) for row in compared] == ["y", "yyy"]


def test_a_prompt_too_long_for_anothers_answer_loses_its_front(answers):
    long = [{"prompt": "0123456", "completion": "a"}, {"prompt": "?", "completion": "bcdefgh"}]
    config = answers("labels")([row | {"label": True} for row in long], ctx_len=8, seed=None)
    samples = build_samples(config, 257)
    assert words(samples[0][1]) == ("6", "bcdefgh") and words(samples[1][1]) == ("?", "a")
    assert all(len(mask) <= 8 for n in range(2) for _, mask in samples[n])


def test_one_labelled_row_has_no_other_beside_it(answers):
    data = answers("labels")
    with pytest.raises(UserError, match="there is only 1 row here; take 2 or more"):
        build_samples(data(rows("labels", 1)), 257)
    with pytest.raises(UserError, match="there is only 1 row here; take 2 or more"):
        split_samples(data(rows("labels", 4)), 257, 0.25)
    train, held_out = split_samples(data(rows("labels", 6)), 257, 0.5)
    assert len(train) == len(held_out) == 3 and any("tokens (answers)" in note for note in train.notes)
    assert "6 labelled answers" in train.notes and not any("document" in note for note in train.notes)


PROMPTED = {"dataload": "pack", "ctx_len": 64, "max_completion_length": 16, "seed": 1}


def test_prompts_know_their_rows(answers):
    """Also if rows are left out, after a split, and in later epochs."""
    good, bad = rows("prompts", 9), [{"question": ["bad"]}, {"prompt": ""}]
    settings = answers("prompts")([bad[0], *good[:4], bad[1], *good[4:]], skip_bad_rows=True, **PROMPTED)
    samples = build_samples(settings, 257)
    assert samples.kind == "prompt" and len(samples) == 9 and all(map(samples.count, range(9)))
    assert any("2 bad rows left out" in note for note in samples.notes)
    for part in (samples, *split_samples(settings, 257, 0.3)):
        for n in range(2 * len(part)):
            row = part.row(n)
            assert row in good and BytesTokenizer().decode(part.prompt(n)) == row["prompt"]
    assert {samples.row(n)["answer"] for n in range(9)} == set(range(9))
    assert "0 count" in show_samples(samples, 1, BytesTokenizer())


def test_a_long_prompt_leaves_room_for_an_answer(answers):
    made = [{"prompt": "0123456789" * 5 + f"{n}:"} for n in range(2)] + [{"prompt": "2:"}]
    samples = build_samples(answers("prompts")(made, **PROMPTED), 257)
    assert sorted(len(samples.prompt(n)) for n in range(3)) == [2, 48, 48]
    assert {BytesTokenizer().decode(samples.prompt(n))[-2:] for n in range(3)} == {"0:", "1:", "2:"}
    assert any("2 rows too long, shortened" in note for note in samples.notes)
    assert len(build_samples(answers("prompts")(made, sft_long="skip", **PROMPTED), 257)) == 1


def test_student_and_teacher_count_the_same_tokens(answers):
    made = rows("contexts", 5)
    samples = build_samples(answers("contexts")(made, seed=None, ctx_len=100), 257)
    assert len(samples) == 5 and "5 rows with contexts" in samples.notes
    batch = TrainBatches(samples, 3).batch(0, 0)
    begins, theirs = batch["cu_seqlens"].tolist(), batch["teacher_cu_seqlens"].tolist()
    for n in range(3):
        own = f"User: {made[n]['question']}\n\nAssistant: 3"
        assert text(batch["tokens"][0, begins[n] : begins[n + 1]]) == own
        whole = f"{made[n]['context'].strip()}\n\n{own}"
        assert text(batch["teacher_tokens"][0, theirs[n] : theirs[n + 1]]) == whole
    assert batch["counted"].numel() == sum(map(samples.count, range(3))) == 9  # " 3" and the end of each
    # the token at which each counted one is predicted is the same
    assert torch.equal(batch["tokens"][0, batch["counted"]], batch["teacher_tokens"][0, batch["teacher_counted"]])
    assert "== sample 1, document 2: " in show_samples(samples, 1, BytesTokenizer())
    train, held_out = split_samples(answers("contexts")(rows("contexts", 1) * 10, ctx_len=60), 257, 0.3)
    assert (len(train), len(held_out)) == (7, 3)
    *_, last = EvalBatches(held_out, 2)  # of which a row that fills up counts nothing
    assert last["counted"].numel() == last["teacher_counted"].numel() == held_out.count(2)


def test_a_context_is_never_shortened(answers):
    short, context = rows("contexts", 1), "Bo is 3. " * 20
    made, data = [*short, short[0] | {"context": context}], answers("contexts")
    size = len(context) + 1 + len("User: Bo?\n\nAssistant: 3")
    told = f"line 2: the context with its question and answer has {size + 1} tokens, and --ctx_len 64 is the most"
    with pytest.raises(UserError, match=f"contexts.jsonl, {told}; this row needs --ctx_len {size}: "):
        build_samples(data(made, ctx_len=64), 257)
    assert len(build_samples(data(made, ctx_len=size), 257)) == 2
    for settings, note in ({"sft_long": "skip"}, "1 row too long, left out"), ({"skip_bad_rows": True}, "1 bad row"):
        samples = build_samples(data(made, ctx_len=64, **settings), 257)
        assert len(samples) == 1 and any(each.startswith(note) for each in samples.notes)


def test_the_answers_behind_contexts_think(answers):
    made = rows("contexts", 1) + [rows("contexts", 1)[0] | {"answer": "<think>Hm.</think>3"}]
    samples = build_samples(answers("contexts")(made, seed=None, sft_think="on", ctx_len=90), 257)
    assert "1 row with thinking, 1 without (<think></think)" in samples.notes
    assert not any("without an answer" in note or "empty" in note for note in samples.notes)


def test_rows_of_two_answers_name_the_data_type_that_reads_them(answers):
    for settings, message in (
        ({"data_type": "sft", "dataload": "pad"}, "--data_type pairs"),
        ({"data_type": "binidx", "dataload": "get", "tokenizer": "world"}, "give --data_type sft, or pairs"),
    ):
        with pytest.raises(UserError, match=message):
            build_samples(answers("pairs")(rows("pairs", 2), **settings), 257)
