"""The demo's documents: the same for the same seed, and no final question has its answer in the training data."""

import json
import re

import pytest

FACT = re.compile(r"(\w+) has (\d) (\w+) (\w+)\.")


def facts(task, text):
    return [task.Fact(name, int(count), color, item) for name, count, color, item in FACT.findall(text)]


@pytest.mark.parametrize("kind", ["base", "finetune", "heldout"])
def test_the_same_arguments_give_the_same_file(task, tmp_path, kind):
    files = [tmp_path / name for name in ("one", "two", "three")]
    for path, seed in zip(files, "112"):
        assert task.main([kind, "--documents", "20", "--seed", seed, "--output", str(path)]) == 0
    one, two, three = (path.read_bytes() for path in files)
    assert one == two != three and len(one.splitlines()) == 20


@pytest.mark.parametrize("kind, field", [("base", "text"), ("finetune", "prompt")])
def test_no_held_out_fact_is_ever_told_in_training(task, kind, field):
    told = [fact for document in task.documents(kind, 2000, 1) for fact in facts(task, document[field])]
    assert len(told) > 1500 and not any(fact.held_out for fact in told)


def test_every_held_out_question_is_about_a_held_out_fact(task):
    for document in task.documents("heldout", 500, 1):
        answer = task.Fact(**json.loads(document["completion"]))
        assert answer.held_out and facts(task, document["prompt"]) == [answer]


def stories(task, count):
    """(fact, lines after the story) of the base documents that contain a story."""
    for document in task.documents("base", count, 1):
        story, *rest = document["text"].splitlines()
        if told := facts(task, story):
            yield told[0], rest


def test_base_documents_answer_truly(task):
    for fact, lines in stories(task, 500):
        truth = {
            "Q: Who has something?": fact.name,
            "Q: How many?": str(fact.count),
            "Q: What color?": fact.color,
            "Q: What things?": fact.item,
            "Q: What is there?": f"{fact.count} {fact.color} {fact.item}",
        }
        assert len(lines) == 8 and all(line.startswith("A: ") == ("A:" in line) for line in lines)
        assert all(answer == f"A: {truth[question]}" for question, answer in zip(lines[::2], lines[1::2]))


def test_no_base_document_shows_the_new_format(task):
    for document in task.documents("base", 2000, 1):
        assert "JSON" not in document["text"] and '{"name"' not in document["text"]


def test_every_sign_of_the_new_format_is_an_answer_now_and_then(task):
    lines = "\n".join(document["text"] for document in task.documents("base", 2000, 1)).splitlines()
    spoken = "".join(line[3:] for line in lines if line.startswith("A: "))
    assert set(next(task.documents("finetune", 1, 1))["completion"]) - {"\n"} <= set(spoken) | {" "}
