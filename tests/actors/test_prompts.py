import itertools
import json

import pytest

from mara.actors.prompts import Prompt, endless, load_prompts
from mara.buffer.codec import RecordLimits
from mara.common.errors import UserError


def test_json_lines_give_prompts_with_ids_and_categories(tmp_path):
    path = tmp_path / "asked.jsonl"
    path.write_text(
        '{"prompt": "Why?", "id": "q1", "category": "doubt", "topic": "life"}\n\n{"prompt": "How?"}\n'
    )
    assert load_prompts(path) == [Prompt("q1", "Why?", "doubt"), Prompt("asked-3", "How?", "")]


def test_a_text_file_has_one_prompt_a_line(tmp_path):
    path = tmp_path / "asked.txt"
    path.write_text("Why?\n  How?  \n")
    assert [p.prompt for p in load_prompts(path)] == ["Why?", "How?"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "has no prompts"),
        (b"\n\n", "has no prompts"),
        (b'{"prompt": "a"}\n{"prompt": ', "line 2: not JSON"),
        (b'{"text": "a"}\n', "line 1: needs an object"),
        (b'{"prompt": ""}\n', "line 1: needs an object"),
        (b'["a"]\n', "line 1: needs an object"),
        (
            b'{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}\n',
            "line 2: the id 'x' stands there twice",
        ),
        (b"\xff\xfe\x00", "not UTF-8"),
        (
            b'{"prompt": "a"}\n{"prompt": "\\ud800 why?"}\n',
            r"line 2: character 1 \('\\ud800'\) is not Unicode",
        ),
        (b'{"prompt": "a", "id": "x\\ud800"}\n', "line 1: character 2"),
        (b"[" * 100_000, "line 1: not JSON"),
        (
            b'{"prompt": "a"}\n{"prompt": "b", "id": "' + "ä".encode() * 257 + b'"}\n',
            "line 2: the id .* has 514 bytes; give one of at most 512",
        ),
    ],
)
def test_a_malformed_file_is_one_line_that_names_the_place(tmp_path, content, says):
    path = tmp_path / "asked.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        load_prompts(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_id_of_the_greatest_length_survives_the_wire(tmp_path):
    path = tmp_path / "asked.jsonl"
    path.write_text(json.dumps({"prompt": "a", "id": "x" * 512}))
    (prompt,) = load_prompts(path)
    assert len(prompt.id) == RecordLimits().max_text_bytes


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x1c", "\x0c"])
def test_only_a_newline_ends_a_line(tmp_path, separator):
    text = f"first{separator}second"
    for name, line in (
        ("asked.jsonl", json.dumps({"prompt": text}, ensure_ascii=False)),
        ("asked.txt", text),
    ):
        (tmp_path / name).write_text(line + "\r\n" + line.replace("first", "other") + "\n", newline="")
        assert [prompt.prompt for prompt in load_prompts(tmp_path / name)] == [
            text,
            f"other{separator}second",
        ]


def test_a_missing_file_is_named_with_the_setting_that_names_it(tmp_path):
    with pytest.raises(UserError, match=r"^prompts\.train: .*nowhere\.jsonl cannot be read"):
        load_prompts(tmp_path / "nowhere.jsonl", "prompts.train")
    with pytest.raises(UserError, match="cannot be read"):
        load_prompts(tmp_path / "a\0b")


@pytest.mark.parametrize(
    ("name", "content"),
    [("asked.jsonl", '{"prompt": "Why?"}\n'), ("asked.txt", "Why?\n"), ("A.TXT", "Why?\n")],
)
def test_the_mark_that_some_editors_put_first_is_no_part_of_a_prompt(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert [prompt.prompt for prompt in load_prompts(tmp_path / name)] == ["Why?"]


def test_an_id_of_null_is_none(tmp_path):
    path = tmp_path / "asked.jsonl"
    path.write_text('{"prompt": "Why?", "id": null}\n{"prompt": "How?", "id": null}\n')
    assert [prompt.id for prompt in load_prompts(path)] == ["asked-1", "asked-2"]


def test_every_prompt_comes_once_in_each_round_in_another_order():
    prompts = [Prompt(str(number), "?") for number in range(20)]
    drawn = list(itertools.islice(endless(prompts, seed=1), 60))
    rounds = [drawn[:20], drawn[20:40], drawn[40:]]
    assert all(sorted(r, key=prompts.index) == prompts for r in rounds)
    assert rounds[0] != rounds[1] != rounds[2]
    assert drawn == list(itertools.islice(endless(prompts, seed=1), 60))
    assert drawn != list(itertools.islice(endless(prompts, seed=2), 60))
