"""The demo's documents: the same for the same seed, and nothing that is asked in the end was ever told before."""

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
    assert len(told) > 2000 and not any(fact.held_out for fact in told)


def test_every_held_out_question_asks_for_a_held_out_fact_of_its_story(task):
    for document in task.documents("heldout", 500, 1):
        answer = task.Fact(**json.loads(document["completion"]))
        assert answer.held_out and answer in facts(task, document["prompt"])
        assert f"Q: {answer.name} " in document["prompt"]


def test_base_documents_answer_truly_and_never_in_json(task):
    for document in task.documents("base", 500, 1):
        story, *rest = document["text"].splitlines()
        told = facts(task, story)
        turns = [line[3:] for line in rest]
        assert len(turns) % 2 == 0 and "{" not in document["text"]
        for question, answer in zip(turns[::2], turns[1::2]):
            assert any((question, answer) in ((f"{fact.name}?", f"{fact.count} {fact.color} {fact.item}"),
                                              (f"{fact.color} {fact.item}?", fact.name)) for fact in told)


def test_answers_alone_stand_behind_the_marker_that_the_loss_looks_for(task):
    for document in task.documents("base", 200, 1):
        assert document["text"].count("A:") == document["text"].count("\nA: ")
