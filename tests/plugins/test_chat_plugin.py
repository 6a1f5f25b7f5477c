"""Conversations: streamed answers, history, interruption, and the page's defence against other pages."""

from __future__ import annotations

import llmpruner_chat
import pytest
import tiny_models
from llmpruner_chat import Chat
from llmpruner_llama import LlamaFamily
from typer.testing import CliRunner

import llmpruner
from llmpruner import ChatFormat, DataError, Model, ModelError, build_graph
from llmpruner.cli.app import build_app
from llmpruner.models.generation import generate
from llmpruner.models.reference import Reference

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def model():
    return tiny_models.llama()


def chat(model, *, template=TEMPLATE, family=LlamaFamily, name="tiny", **options):
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = template
    graph = build_graph(family(), model.config)
    loaded = Model(Reference(name), model.config, family(), graph, network=model, tokenizer=tokenizer)
    return Chat(loaded, **{"max_new_tokens": 12, **options})


def ask(one, text):
    pieces = []
    one.ask(text, pieces.append)
    return pieces


def test_the_pieces_are_the_answer_and_the_second_turn_has_the_first(model):
    one = chat(model)
    pieces = ask(one, "Why?")
    answer = "".join(pieces)
    tokenizer = tiny_models.tokenizer()
    asked = {"add_special_tokens": False, "max_new_tokens": 12}
    assert answer.strip("\n") == generate(model, tokenizer, "<user>Why?\n<assistant>", **asked)
    assert len(pieces) > 1 and one.exchanges == [("Why?", answer)]
    both = f"<user>Why?\n<assistant>{answer.strip()}\n<user>And then?\n<assistant>"
    assert "".join(ask(one, "And then?")).strip("\n") == generate(model, tokenizer, both, **asked)
    assert [question for question, _ in one.exchanges] == ["Why?", "And then?"]


def test_an_answer_ends_before_the_stop_text_of_its_format(model):
    def formatted(chat_format):
        family = type("Formatted", (LlamaFamily,), {"chat_format": chat_format})
        return chat(model, family=family, max_new_tokens=24)

    whole = "".join(ask(formatted(ChatFormat()), "Why?"))

    class Stops(ChatFormat):
        stop_text = next(whole[n : n + 3] for n in range(8, len(whole)) if whole.index(whole[n : n + 3]) == n)

    one = formatted(Stops())
    expected = whole.partition(Stops.stop_text)[0]
    assert "".join(ask(one, "Why?")) == expected and one.exchanges == [("Why?", expected)]


def test_an_interrupted_answer_is_kept_as_far_as_it_came(model):
    one, pieces = chat(model, max_new_tokens=400), []

    def interrupt(piece):
        pieces.append(piece)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one.ask("Why?", interrupt)
    assert one.exchanges == [("Why?", pieces[0])] and len(pieces) == 1


def test_a_conversation_beyond_the_models_positions_is_refused_and_not_kept(model):
    one = chat(model)
    with pytest.raises(DataError, match="the model reads 512; shorten it"):
        one.ask("word " * 600, print)
    assert one.exchanges == []


def talk(monkeypatch, chats, lines):
    waiting = iter(chats)
    for name in ("discover", "load"):
        monkeypatch.setattr(llmpruner, name, lambda *_, **__: None, raising=False)
    monkeypatch.setattr(llmpruner_chat, "Chat", lambda *_, **__: next(waiting))
    names = [one.name for one in chats]
    return CliRunner().invoke(build_app(), ["chat", *names], input="\n".join(lines) + "\n")


def test_the_terminal_names_the_models_keeps_and_forgets(model, monkeypatch):
    chats = [chat(model, name="dense"), chat(model, name="pruned", template=None)]
    result = talk(monkeypatch, chats, ["Why?", "/nothing", "And then?"])
    assert result.exit_code == 0 and [len(one.exchanges) for one in chats] == [2, 2]
    assert result.output.count("dense") == 2 and chats[0].exchanges[0][1].strip() in result.output
    assert "no such command: /nothing" in result.output
    talk(monkeypatch, chats, ["/reset", "/quit", "never asked"])
    assert [one.exchanges for one in chats] == [[], []]


def test_an_interrupt_stops_one_answer_and_the_next_model_answers(model, monkeypatch):
    stopped, other = chat(model, name="stopped"), chat(model, name="other")

    def interrupted(text, on_text):
        on_text("so")
        raise KeyboardInterrupt

    monkeypatch.setattr(stopped, "ask", interrupted)
    result = talk(monkeypatch, [stopped, other], ["Why?"])
    assert result.exit_code == 0 and "[…]" in result.output and len(other.exchanges) == 1


def test_every_model_is_known_before_one_is_loaded(model, monkeypatch, tmp_path):
    model.save_pretrained(tmp_path / "dense")
    monkeypatch.setattr(llmpruner, "load", lambda *_, **__: pytest.fail("loaded"), raising=False)
    found = CliRunner().invoke(build_app(), ["chat", str(tmp_path / "dense"), str(tmp_path / "none")])
    assert isinstance(found.exception, ModelError) and "none' does not exist" in str(found.exception)


@pytest.fixture
def client(model):
    testing = pytest.importorskip("starlette.testclient")
    from llmpruner_chat.web import chat_app

    chats = [chat(model, name="dense"), chat(model, name="pruned", template=None)]
    return testing.TestClient(chat_app(chats), base_url="http://127.0.0.1:8123")


def test_the_server_streams_the_answer_of_the_model_that_is_asked(client, model):
    assert client.get("/models").json() == [{"name": "dense"}, {"name": "pruned"}]
    page = client.get("/")
    assert "nonce" in page.headers["content-security-policy"] and "{{" not in page.text
    for number, one in enumerate((chat(model), chat(model, template=None))):
        exchanges = [["Hi", "Hello"]]
        found = client.post("/answer", json={"model": number, "exchanges": exchanges, "text": "Why?"})
        assert found.status_code == 200
        pieces = []
        one.answer([("Hi", "Hello")], "Why?", pieces.append)
        assert found.text == "".join(pieces)


def test_a_foreign_host_or_page_is_refused(client):
    question, foreign = {"model": 0, "exchanges": [], "text": "Why?"}, {"host": "evil.example:8123"}
    assert client.post("/answer", json=question, headers=foreign).status_code == 400
    assert client.get("/models", headers=foreign).status_code == 400
    assert client.get("/models", headers={"host": "localhost:8123"}).status_code == 200
    preflight = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    answer = client.options("/answer", headers=preflight)
    assert answer.status_code == 405 and not any(name.startswith("access-control") for name in answer.headers)


def test_what_is_no_question_is_refused(client):
    good = {"model": 0, "exchanges": [], "text": "Why?"}
    for change in ({"model": 2}, {"text": ""}, {"exchanges": "x"}, {"more": 1}):
        assert client.post("/answer", json={**good, **change}).status_code == 400
    plain = client.post("/answer", content='{"model": 0}', headers={"content-type": "text/plain"})
    assert plain.status_code == 415
    long = client.post("/answer", json={**good, "text": "word " * 600})
    assert long.status_code == 400 and "shorten it" in long.text
