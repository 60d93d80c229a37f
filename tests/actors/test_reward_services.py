"""Reward models that are not checkpoints: a Python function, and a server, which really runs."""

import json
import logging
import pickle
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mara.actors.reward_models.config import FunctionRewardConfig, HttpRewardConfig
from mara.actors.reward_models.function import FunctionFailed, FunctionRewardModel, load_function
from mara.actors.reward_models.http import HttpFailed, HttpRefused, HttpRewardModel
from mara.actors.reward_models.loading import load_reward_model
from mara.common.contracts import Conversation
from mara.common.errors import UserError

CONVERSATIONS = [Conversation(f"p{n}", "r" * n) for n in range(5)]


def test_a_function_scores_batches_in_order():
    asked = []

    def count(prompts, responses):
        asked.append(prompts)
        return (len(response) for response in responses)

    scores = FunctionRewardModel(count, batch_size=2).score(CONVERSATIONS)
    assert scores.tolist() == [0, 1, 2, 3, 4]
    assert asked == [["p0", "p1"], ["p2", "p3"], ["p4"]]


def test_a_function_that_gives_another_number_of_scores_is_an_error():
    with pytest.raises(FunctionFailed, match="^ValueError: the function gave 1 scores for 2"):
        FunctionRewardModel(lambda prompts, responses: [1.0], batch_size=2).score(CONVERSATIONS)


def test_a_function_that_exits_ends_nothing_else():
    with pytest.raises(FunctionFailed, match="^SystemExit: the function exits with status 3"):
        FunctionRewardModel(lambda prompts, responses: sys.exit(3), 2).score(CONVERSATIONS)


def test_what_a_function_raises_can_be_told_where_its_module_is_not_known():
    class Own(Exception):
        pass

    def fails(prompts, responses):
        raise Own("first line\nsecond")

    with pytest.raises(FunctionFailed) as caught:
        FunctionRewardModel(fails, 2).score(CONVERSATIONS)
    assert str(pickle.loads(pickle.dumps(caught.value))) == "Own: first line"


def test_a_function_is_found_in_a_file_of_the_folder(tmp_path):
    (tmp_path / "judge_of_this_test.py").write_text(
        "def score(prompts, responses): return [2.0] * len(prompts)\nnot_one = 3\n"
    )
    config = FunctionRewardConfig(function="judge_of_this_test:score", weight=1.0)
    model = load_reward_model("rewards.mine", config, tmp_path)
    assert model.score(CONVERSATIONS).tolist() == [2.0] * 5
    for name, says in (
        ("judge_of_this_test:none", "has no function 'none'"),
        ("judge_of_this_test:not_one", "has no function"),
        ("no_such_judge:score", "ModuleNotFoundError: No module named 'no_such_judge'"),
    ):
        with pytest.raises(UserError, match=f"^rewards.mine.function: .*{says}"):
            load_reward_model("rewards.mine", FunctionRewardConfig(function=name, weight=1.0), tmp_path)


def test_a_module_that_fails_when_it_is_imported_is_one_line(tmp_path):
    (tmp_path / "broken_judge.py").write_text("1 / 0\n")
    with pytest.raises(UserError, match=r"cannot be imported \(ZeroDivisionError: division by zero\)"):
        load_function("broken_judge:score", tmp_path)


class Server:
    """A scoring server that answers what it is told to."""

    def __init__(self) -> None:
        self.requests: list[tuple[dict, dict]] = []
        self.statuses: list[int] = []
        """Of the next answers; then 200."""
        self.answer = lambda content: {"scores": [len(one["response"]) for one in content["conversations"]]}
        self.delay_s = 0.0
        self.pause_s = 0.0
        """After each byte of an answer."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append((content, dict(self.headers)))
                time.sleep(server.delay_s)
                self.send_response(server.statuses.pop(0) if server.statuses else 200)
                answer = server.answer(content)
                body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                for place in range(len(body)) if server.pause_s else ():
                    self.wfile.write(body[place : place + 1])
                    time.sleep(server.pause_s)
                if not server.pause_s:
                    self.wfile.write(body)

            def log_message(self, *arguments):
                pass

        self._httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._httpd.handle_error = lambda *arguments: None  # A client that has left is part of the tests.
        self.url = f"http://127.0.0.1:{self._httpd.server_port}/score"
        threading.Thread(target=self._httpd.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._httpd.shutdown()
        self._httpd.server_close()


@pytest.fixture
def server():
    running = Server()
    yield running
    running.close()


def make_model(server, **settings) -> HttpRewardModel:
    return HttpRewardModel(HttpRewardConfig(url=server.url, weight=1.0, retry_first_s=0.01, **settings))


def test_conversations_are_posted_in_batches_and_their_scores_come_back_in_order(server):
    assert make_model(server, batch_size=2).score(CONVERSATIONS).tolist() == [0, 1, 2, 3, 4]
    assert [len(content["conversations"]) for content, _ in server.requests] == [2, 2, 1]
    assert server.requests[0][0] == {
        "conversations": [{"prompt": "p0", "response": ""}, {"prompt": "p1", "response": "r"}]
    }
    assert "Authorization" not in server.requests[0][1]


def test_a_score_that_the_server_could_not_give_is_not_finite_and_the_others_are(server):
    server.answer = lambda content: {"scores": [1.0, None, 2]}
    assert make_model(server).score(CONVERSATIONS[:3]).isfinite().tolist() == [True, False, True]


def test_the_score_endpoint_gets_texts_in_pairs_and_is_read_by_index(server):
    server.answer = lambda content: {
        "data": [
            {"index": 1, "object": "score", "score": 0.5},
            {"index": 0, "object": "score", "score": -3.25},
        ]
    }
    model = make_model(server, protocol="vllm_score", model="rm")
    assert model.score(CONVERSATIONS[1:3]).tolist() == [-3.25, 0.5]
    assert server.requests[0][0] == {
        "model": "rm", "use_activation": False, "text_1": ["p1", "p2"], "text_2": ["r", "rr"]
    }  # fmt: skip


def test_the_classify_endpoint_gets_templated_texts_and_one_label_is_the_score(server):
    server.answer = lambda content: {
        "data": [
            {"index": i, "label": "x", "probs": [0.0, float(len(text))], "num_classes": 2}
            for i, text in enumerate(content["input"])
        ]
    }
    settings = {"protocol": "classify", "template": "Q: {prompt} A: {response}"}
    assert make_model(server, label=1, **settings).score(CONVERSATIONS[1:3]).tolist() == [10.0, 11.0]
    assert server.requests[0][0]["input"] == ["Q: p1 A: r", "Q: p2 A: rr"]
    with pytest.raises(HttpFailed, match="probs has 2 entries, set label"):
        make_model(server, **settings).score(CONVERSATIONS)
    with pytest.raises(HttpFailed, match="IndexError"):
        make_model(server, label=2, **settings).score(CONVERSATIONS)


def test_a_busy_server_is_asked_again(server):
    server.statuses = [503, 429]
    assert make_model(server).score(CONVERSATIONS[:2]).tolist() == [0, 1]
    assert len(server.requests) == 3


def test_a_server_that_stays_busy_is_asked_so_often_and_no_more(server):
    server.statuses = [500] * 10
    with pytest.raises(HttpFailed, match=r"status 500 \(attempt 4\)"):
        make_model(server, max_attempts=4).score(CONVERSATIONS)
    assert len(server.requests) == 4


def test_a_server_that_refuses_is_not_asked_again(server):
    server.statuses = [401]
    with pytest.raises(HttpFailed, match="status 401$"):
        make_model(server).score(CONVERSATIONS)
    assert len(server.requests) == 1


def test_what_a_server_says_of_a_request_that_it_does_not_take_is_told(server):
    server.statuses, server.answer = [400], lambda content: b"too long " * 100
    with pytest.raises(HttpRefused, match=r"/score: status 400: '(too long ){22}to'$"):
        make_model(server).score(CONVERSATIONS)
    assert len(server.requests) == 1


def test_a_server_that_is_slow_fails_within_the_time_for_all_attempts(server):
    server.delay_s = 5.0
    started = time.monotonic()
    with pytest.raises(HttpFailed, match="timed out"):
        make_model(server, timeout_s=0.3, max_attempts=100).score(CONVERSATIONS)
    assert time.monotonic() - started < 60


def test_an_answer_that_comes_byte_by_byte_fails_when_the_time_is_over(server):
    server.answer = lambda content: json.dumps({"scores": [1.0]}).encode() + b" " * 100
    server.pause_s = 0.05
    with pytest.raises(HttpFailed, match=r"/score: no whole answer in 0\.3 s$"):
        make_model(server, timeout_s=0.3).score(CONVERSATIONS[:1])


def test_a_server_that_is_not_there_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    config = HttpRewardConfig(url=f"http://127.0.0.1:{port}/", weight=1.0, retry_first_s=0.01, max_attempts=2)
    with pytest.raises(HttpFailed, match=r"refused \(attempt 2\)"):
        HttpRewardModel(config).score(CONVERSATIONS)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"<html>", "not JSON"),
        ([], "not of protocol mara"),
        ({"score": [1]}, "not of protocol mara"),
        ({"scores": ["1", "2"]}, "a score is a str"),
        ({"scores": [True, False]}, "a score is a bool"),
        ({"scores": [1.0]}, "1 scores for 2 conversations"),
    ],
)
def test_an_answer_of_another_form_fails_with_the_reason(server, answer, says):
    server.answer = lambda content: answer
    with pytest.raises(HttpFailed, match=says) as caught:
        make_model(server).score(CONVERSATIONS[:2])
    assert "\n" not in str(caught.value)
    assert len(server.requests) == 1


def test_the_key_is_sent_and_never_told(server, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("KEY_OF_THIS_TEST", "s3cret")
    model = make_model(server, api_key_env="KEY_OF_THIS_TEST", max_attempts=1)
    assert model.score(CONVERSATIONS).tolist() == [0, 1, 2, 3, 4]
    assert server.requests[0][1]["Authorization"] == "Bearer s3cret"
    for statuses in ([500], [401]):
        server.statuses = statuses
        with pytest.raises(HttpFailed) as caught:
            model.score(CONVERSATIONS)
        assert "s3cret" not in str(caught.value)
    assert "s3cret" not in caplog.text
    monkeypatch.delenv("KEY_OF_THIS_TEST")
    with pytest.raises(UserError, match="api_key_env=KEY_OF_THIS_TEST: this variable is not set"):
        make_model(server, api_key_env="KEY_OF_THIS_TEST")


@pytest.mark.parametrize(
    "url", ["host:8000", "ftp://host/", "http://", "http://me:s3cret@host/", "http://host/?api_key=s3cret"]
)
def test_an_address_that_is_none_or_holds_a_secret_is_refused(url):
    with pytest.raises(ValueError, match="url (is not the address|must have no user)"):
        HttpRewardConfig(url=url, weight=1.0)
