import itertools

import pytest

from mara.actors.prompts import Prompt, endless, load_prompts
from mara.common.errors import UserError


def test_json_lines_give_prompts_with_ids_and_categories(tmp_path):
    path = tmp_path / "asked.jsonl"
    path.write_text(
        '{"prompt": "Why?", "id": "q1", "category": "doubt", "harmful": false}\n\n{"prompt": "How?"}\n'
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
    ],
)
def test_a_malformed_file_is_one_line_that_names_the_place(tmp_path, content, says):
    path = tmp_path / "asked.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        load_prompts(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.jsonl cannot be read"):
        load_prompts(tmp_path / "nowhere.jsonl")


def test_every_prompt_comes_once_in_each_round_in_another_order():
    prompts = [Prompt(str(number), "?") for number in range(20)]
    drawn = list(itertools.islice(endless(prompts, seed=1), 60))
    rounds = [drawn[:20], drawn[20:40], drawn[40:]]
    assert all(sorted(r, key=prompts.index) == prompts for r in rounds)
    assert rounds[0] != rounds[1] != rounds[2]
    assert drawn == list(itertools.islice(endless(prompts, seed=1), 60))
    assert drawn != list(itertools.islice(endless(prompts, seed=2), 60))
