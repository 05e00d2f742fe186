"""Data sets: each form is read as published, contexts end before their questions, generators are seeded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from eval.chat import with_template
from eval.datasets import load
from eval.datasets.request import Request
from eval.examples import Dataset, Example, Question, split, with_question
from eval.reference import MODEL_PATH
from eval.scorers import SCORERS
from hf_cachegen.errors import ConfigError

DATA = os.environ.get("CACHEGEN_EVAL_DATA")
published = pytest.mark.skipif(DATA is None, reason="CACHEGEN_EVAL_DATA names no folder with the published cases")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_PATH)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `datasets` keep its copies of Parquet files in the folder of the test."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


def loaded(spec: str, tokenizer: Any, limit: int | None = None, seed: int = 0) -> Dataset:
    return load(spec, Request(tokenizer, limit, seed))


GENERATED = ["reference-lines:lines=20", "reference-topics:tokens=400", "reference-stories:tokens=400",
             "longeval-lines:lines=20", "longeval-topics:topics=3,turns=1"]  # fmt: skip


@pytest.mark.parametrize("spec", GENERATED)
def test_generators_are_seeded(spec: str, tokenizer: Any) -> None:
    first = loaded(spec, tokenizer, 3)
    assert first == loaded(spec, tokenizer, 3)
    assert len({example.context for example in first.examples}) == 3
    assert loaded(spec, tokenizer, 3, seed=7).examples[0].context != first.examples[0].context
    for example in first.examples:
        for question in example.questions:
            assert question.answers[0] in example.context
            assert question.text not in example.context


@pytest.mark.parametrize("name", ["longeval-lines", "longeval-topics"])
def test_generated_cases_have_the_requested_length(name: str, tokenizer: Any) -> None:
    for tokens in (700, 1500):
        for example in loaded(f"{name}:tokens={tokens}", tokenizer, 2).examples:
            assert 0.75 * tokens <= len(tokenizer(example.context).input_ids) <= 1.05 * tokens


def test_a_generated_line_is_answered_by_its_own_record(tokenizer: Any) -> None:
    for example in loaded("longeval-lines:lines=30", tokenizer, 5).examples:
        name = example.questions[0].text.split("in line ")[1].split("?")[0]
        assert f"line {name}: REGISTER_CONTENT is <{example.questions[0].answers[0]}>" in example.context


@published
@pytest.mark.parametrize(
    ("spec", "marker"),
    [
        ("longeval-lines:path=$CACHEGEN_EVAL_DATA/longeval_200_lines.jsonl", "Now the record is over."),
        ("longeval-topics:path=$CACHEGEN_EVAL_DATA/longeval_5_topics.jsonl", "Now the record ends."),
        ("longeval-topics:path=$CACHEGEN_EVAL_DATA/cachegen_longchat.jsonl", "Now the record ends."),
    ],
)
def test_the_published_cases_are_split_before_their_question(spec: str, marker: str, tokenizer: Any) -> None:
    dataset = loaded(spec, tokenizer)
    assert len(dataset.examples) == 50
    assert len(dataset.source["sha256"]) == 64
    for example in dataset.examples:
        (question,) = example.questions
        assert marker not in example.context
        assert question.text.lstrip().startswith(marker)
        assert SCORERS[dataset.scores[0]](f"It is {question.answers[0]}", question.answers) == 1.0
    artifact = "cachegen" in spec
    assert dataset.new_tokens == (20 if artifact else 100 if "lines" in spec else 50)
    assert dataset.chat_template is not artifact


@published
def test_wikitext_windows_follow_each_other(tokenizer: Any) -> None:
    spec = "wikitext:path=$CACHEGEN_EVAL_DATA/wikitext2_valid.txt,prefix=96,suffix=32"
    dataset = loaded(spec, tokenizer, 4)
    assert dataset.source["<unk>"] == 11_718  # the copy is tokenised, not raw
    examples = dataset.examples
    text = (Path(str(DATA)) / "wikitext2_valid.txt").read_text()
    assert text.startswith("".join(e.context + str(e.questions[0].completion) for e in examples))
    for example in examples:
        assert abs(len(tokenizer(example.context).input_ids) - 96) <= 3
        assert abs(len(tokenizer(str(example.questions[0].completion)).input_ids) - 32) <= 3


def on_the_hub(folder: Path, name: str, split_: str, rows: list[dict[str, Any]]) -> Path:
    """Write a folder like a Parquet repository of the Hub."""
    datasets = pytest.importorskip("datasets")
    (folder / name).mkdir(parents=True)
    datasets.Dataset.from_list(rows).to_parquet(folder / name / f"{split_}-00000-of-00001.parquet")
    files = f"  data_files:\n  - split: {split_}\n    path: {name}/{split_}-*\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {name}\n{files}---\n")
    return folder


LONGBENCH_ROWS = [
    {"input": f"Passage: p{n}\nQuestion: q{n}?\nAnswer:", "context": f"Passage: example {n}", "answers": [f"a{n}", "b"],
     "length": 3, "dataset": "triviaqa", "language": "en", "all_classes": None, "_id": f"id{n}"}
    for n in range(3)
]  # fmt: skip


@pytest.mark.parametrize("name", ["triviaqa", "narrativeqa"])
def test_longbench_rows_are_read(name: str, tmp_path: Path, tokenizer: Any) -> None:
    folder = on_the_hub(tmp_path / "bench", name, "test", LONGBENCH_ROWS)
    dataset = loaded(f"longbench-{name}:repo={folder}", tokenizer, 2)
    assert [example.id for example in dataset.examples] == ["id0", "id1"]
    example = dataset.examples[1]
    assert example.context.endswith({"triviaqa": "Passage: p1\n", "narrativeqa": "Passage: example 1"}[name])
    assert "Passage: example 1" in example.context
    assert "q1?" in example.questions[0].text
    assert (dataset.new_tokens, dataset.chat_template, dataset.too_long) == (
        {"triviaqa": 32, "narrativeqa": 128}[name], name == "narrativeqa", "middle",
    )  # fmt: skip
    assert "q1?" not in example.context
    assert example.questions[0].answers == ("a1", "b")
    assert dataset.scores[0] == "f1"
    assert dataset.source["revision"] == "main"
    by_files = loaded(f"longbench-{name}:repo={folder},files={name}/*.parquet", tokenizer, 2)
    assert by_files.examples == dataset.examples


def test_longbench_rows_without_a_question_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{**LONGBENCH_ROWS[0], "input": "Passage: p0\nq0?"}]
    folder = on_the_hub(tmp_path / "bench", "triviaqa", "test", rows)
    with pytest.raises(ConfigError, match="row 0: expected 'Question:'"):
        loaded(f"longbench-triviaqa:repo={folder}", tokenizer)


TRIVIA_ROWS = [
    {
        "question": "Which musical?", "question_id": f"tc_{n}", "question_source": "x",
        "entity_pages": {"doc_source": ["TagMe"][:n], "filename": ["a.txt"][:n], "title": ["A"][:n],
                         "wiki_context": ["Sunset Boulevard is a musical."][:n]},
        "search_results": {"description": ["d"], "filename": ["f"], "rank": [0], "title": ["t"], "url": ["u"],
                           "search_context": ["The web says Sunset."]},
        "answer": {"aliases": ["Sunset Blvd", "Sunset Boulevard"], "normalized_aliases": ["sunset blvd"],
                   "matched_wiki_entity_name": "", "normalized_matched_wiki_entity_name": "",
                   "normalized_value": "sunset boulevard", "type": "WikipediaEntity", "value": "Sunset Boulevard"},
    }
    for n in (0, 1)
]  # fmt: skip


def test_triviaqa_is_read_as_published_on_the_hub(tmp_path: Path, tokenizer: Any) -> None:
    folder = on_the_hub(tmp_path / "trivia_qa", "rc", "validation", TRIVIA_ROWS)
    dataset = loaded(f"triviaqa:repo={folder}", tokenizer)
    (example,) = dataset.examples
    assert example.id == "tc_1"
    assert dataset.source["without_document"] == 1
    assert "Sunset Boulevard is a musical." in example.context
    assert example.questions[0].answers == ("Sunset Boulevard", "Sunset Blvd")
    assert "Which musical?" in example.questions[0].text
    web = loaded(f"triviaqa:repo={folder},documents=web", tokenizer).examples
    assert [example.id for example in web] == ["tc_0--f", "tc_1--f"]


def test_web_has_one_question_per_document_and_verified_is_a_subset(tmp_path: Path, tokenizer: Any) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"Document {name}.")
    pages = [{"Filename": f"{name}.txt", "DocPartOfVerifiedEval": name == "b"} for name in "abc"]
    records = [
        {"Answer": {"Value": "x"}, "SearchResults": pages, "Question": "?", "QuestionId": str(n),
         "QuestionPartOfVerifiedEval": n == 1}
        for n in range(2)
    ]  # fmt: skip
    (tmp_path / "qa.json").write_text(json.dumps({"Data": records}))
    spec = f"triviaqa:path={tmp_path / 'qa.json'},evidence={tmp_path},documents=web"
    assert len(loaded(spec, tokenizer).examples) == 6
    assert len(loaded(spec, tokenizer, 4).examples) == 4
    (verified,) = loaded(f"{spec},verified=1", tokenizer).examples
    assert verified.id == "1--b.txt"
    assert verified.context.endswith("Document b.")


@published
def test_triviaqa_is_read_as_published_in_json(tmp_path: Path, tokenizer: Any) -> None:
    spec = f"triviaqa:path=$CACHEGEN_EVAL_DATA/triviaqa_sample.json,evidence={tmp_path}"
    with pytest.raises(ConfigError, match="no examples"):
        loaded(spec, tokenizer)
    (tmp_path / "Andrew_Lloyd_Webber.txt").write_text("He wrote Sunset Boulevard.")
    (example,) = loaded(spec, tokenizer).examples
    assert "He wrote Sunset Boulevard." in example.context
    assert {"Sunset Boulevard", "West Sunset Boulevard"} <= set(example.questions[0].answers)
    with pytest.raises(ConfigError, match="evidence= to name"):
        loaded("triviaqa:path=$CACHEGEN_EVAL_DATA/triviaqa_sample.json", tokenizer)


def test_a_document_outside_the_evidence_is_left_out(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "secret.txt").write_text("not for you")
    (tmp_path / "evidence").mkdir()
    pages = [{"Filename": "../secret.txt"}]
    record = {"Answer": {"Value": "x"}, "EntityPages": pages, "Question": "?", "QuestionId": "1"}
    (tmp_path / "qa.json").write_text(json.dumps({"Data": [record]}))
    with pytest.raises(ConfigError, match="no examples"):
        loaded(f"triviaqa:path={tmp_path / 'qa.json'},evidence={tmp_path / 'evidence'}", tokenizer)


def test_narrativeqa_groups_the_questions_of_a_story(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"document": {"id": f"d{n // 2}", "text": f"Story {n // 2}.", "summary": {"text": "Short."}},
         "question": {"text": f"Who {n}?"}, "answers": [{"text": "he"}, {"text": "him"}]}
        for n in range(4)
    ]  # fmt: skip
    folder = on_the_hub(tmp_path / "nqa", "default", "test", rows)
    dataset = loaded(f"narrativeqa:repo={folder}", tokenizer)
    assert [(example.id, len(example.questions)) for example in dataset.examples] == [("d0", 2), ("d1", 2)]
    assert dataset.examples[1].context.endswith("Story 1.")
    assert dataset.scores == ("f1", "rouge_l", "bleu_1", "bleu_4", "meteor", "em")
    short = loaded(f"narrativeqa:repo={folder},of=summary,questions=1", tokenizer, 1)
    assert short.examples[0].context.endswith("Short.")
    assert len(short.examples[0].questions) == 1


def test_jsonl_joins_rows_of_one_context(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"context": "c1", "question": "q1", "answers": ["a"], "id": "first"},
        {"context": "c1", "question": "q2", "answers": "b", "completion": " b."},
        {"context": "c2", "question": "q3", "answers": []},
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    dataset = loaded(f"jsonl:path={tmp_path / 'mine.jsonl'},scores=em,first_line=1,new_tokens=5", tokenizer)
    assert dataset.examples[0] == Example("first", "c1", (Question("q1", ("a",)), Question("q2", ("b",), " b.")))
    assert dataset.examples[1].id == "3"
    assert (dataset.scores, dataset.first_line, dataset.new_tokens) == (("em",), True, 5)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("[1]", "line 1: expected a JSON object"),
        ("{", "line 1"),
        ('{"context": "c", "question": "q"}', "expected a field 'answers'"),
        ('{"context": "c", "question": "q", "answers": [1]}', "answers texts"),
        ('{"context": 1, "question": "q", "answers": ["a"]}', "must be texts"),
        ('{"context": "c", "question": "q", "answers": ["a"], "completion": 3}', "completion must be a text"),
    ],
)
def test_jsonl_names_the_row_that_is_wrong(line: str, match: str, tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "bad.jsonl").write_text(line + "\n")
    with pytest.raises(ConfigError, match=match):
        loaded(f"jsonl:path={tmp_path / 'bad.jsonl'}", tokenizer)


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("nothing", "unknown data set 'nothing'"),
        ("longeval-lines:colour=red", "unknown option 'colour=red'"),
        ("longeval-lines:lines", "unknown option 'lines'"),
        ("longeval-lines:lines=many", "expected a whole number"),
        ("longeval-lines:lines=0", "from 1 to"),
        ("longeval-lines:path=/no/such/file", "cannot read"),
        ("jsonl", "path=FILE"),
        ("jsonl:path=x,scores=good", "unknown scores"),
        ("triviaqa:documents=books", "'wikipedia' or 'web'"),
        ("triviaqa:verified=1", "verified=1 needs path="),
        ("narrativeqa:of=title", "'text' or 'summary'"),
        ("wikitext:prefix=0", "at least 1"),
        ("documents:path=x,suffix=0", "at least 1"),
        ("documents:path=/no/such/file", "found none"),
        ("key-values:pairs=2,questions=3", "one for each of the 2 pairs"),
        ("needle", "needs path=FILE"),
    ],
)
def test_wrong_specifications_are_refused(spec: str, match: str, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=match):
        loaded(spec, tokenizer)


def test_documents_are_files_or_fields_of_rows(tmp_path: Path, tokenizer: Any) -> None:
    texts = ["the old kettle was calm in the garden " * 9, "short", "a brave lamp near the river " * 12]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    files = loaded(f"documents:path={tmp_path}/*.txt,prefix=20,suffix=8,title=Files", tokenizer)
    rows = loaded(f"documents:path={tmp_path}/rows.jsonl,field=prompt,prefix=20,suffix=8", tokenizer)
    assert files.name == "Files"
    assert [example.id for example in files.examples] == ["0.txt", "2.txt"]
    assert [example.context for example in files.examples] == [example.context for example in rows.examples]
    for example, text in zip(files.examples, (texts[0], texts[2]), strict=True):
        completion = example.questions[0].completion or ""
        assert text.startswith(example.context + completion)
        assert len(tokenizer(example.context + completion).input_ids) == 28
    (tmp_path / "rows.jsonl").write_text('{"prompt": 3}\n')
    with pytest.raises(ConfigError, match="expected a text in 'prompt'"):
        loaded(f"documents:path={tmp_path}/rows.jsonl,field=prompt", tokenizer)


def test_values_are_asked_for_by_their_keys(tokenizer: Any) -> None:
    first, second = loaded("key-values:pairs=6,questions=2", tokenizer, limit=2).examples
    assert first.context != second.context
    record = json.loads(first.context.split("\n\n", 1)[1])
    assert len(record) == 6
    for question in first.questions:
        assert record[question.text.split('"')[1]] == question.answers[0]
        assert SCORERS["line"](question.completion or "", question.answers) == 1.0
    assert loaded("key-values:pairs=6,questions=2", tokenizer, limit=2, seed=1).examples[0] != first


def test_a_needle_lies_at_its_depth(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "hay.txt").write_text("The old kettle was calm in the garden. " * 60)
    found = loaded(f"needle:path={tmp_path}/hay.txt,tokens=100,depths=3", tokenizer, limit=3).examples
    depths = [example.context.index("The secret number") / len(example.context) for example in found]
    assert depths[0] == 0
    assert depths[1] == pytest.approx(0.45, abs=0.1)
    assert depths[2] > 0.8
    assert all(example.questions[0].answers[0] in example.context for example in found)
    with pytest.raises(ConfigError, match="expected at least 100000 tokens"):
        loaded(f"needle:path={tmp_path}/hay.txt,tokens=50000", tokenizer, limit=2)


def test_a_folder_without_a_data_set_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="cannot load"):
        loaded(f"longbench-triviaqa:repo={tmp_path}", tokenizer)


def test_two_examples_with_one_name_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"context": c, "question": "q", "answers": ["a"], "id": "x"} for c in "ab"]
    (tmp_path / "twice.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ConfigError, match="two examples"):
        loaded(f"jsonl:path={tmp_path / 'twice.jsonl'}", tokenizer)


def test_splitting_leaves_the_space_with_the_question() -> None:
    assert split("text here. Now ask?", "Now") == ("text here.", " Now ask?")
    assert split("Now a. Now b", "Now") == ("Now a.", " Now b")
    assert split("none", "Now") is None


def test_the_question_can_be_cached_too() -> None:
    example = Example("e", "context", (Question(" one?", ("1",)), Question(" two?", ("2",), "2.")))
    assert list(with_question([example])) == [
        Example("e/0", "context one?", (Question("", ("1",)),)),
        Example("e/1", "context two?", (Question("", ("2",), "2."),)),
    ]


def test_a_chat_template_is_cut_where_the_context_ends(tokenizer: Any) -> None:
    example = Example("e", "The sea is blue.", (Question(" What is blue?", ("sea",)),))
    with pytest.raises(ConfigError, match="no chat template"):
        list(with_template(tokenizer, [example]))
    chat = AutoTokenizer.from_pretrained(MODEL_PATH)
    chat.chat_template = (
        "{% for m in messages %}<bos>[{{ m.role }}] {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %} [bot]{% endif %}"
    )
    (made,) = with_template(chat, [example])
    assert made.context == "<bos>[user] The sea is blue."
    assert made.questions[0].text == " What is blue? [bot]"
    chat.chat_template = "{{ messages[0].content | upper }}"
    with pytest.raises(ConfigError, match="does not keep the context"):
        list(with_template(chat, [example]))
