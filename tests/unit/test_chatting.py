"""Conversations: streamed answers, history, interruption, and the page's defence against other pages."""

from __future__ import annotations

import threading
import time

import pytest
import tiny_models
from llmpruner_llama.family import LlamaFamily
from llmpruner_vicuna.family import VicunaFamily
from typer.testing import CliRunner

from llmpruner import DataError, api
from llmpruner.calibration.chat import conversation_prompt
from llmpruner.chatting.chat import Chat, before_text
from llmpruner.cli.app import build_app
from llmpruner.errors import SettingsError
from llmpruner.models.generation import generate

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
    return Chat(name, model, tokenizer, family(), **{"max_new_tokens": 12, **options})


def test_the_pieces_are_the_answer_of_generate_and_the_second_turn_has_the_first(model):
    one = chat(model)
    pieces = list(one.ask("Why?"))
    assert "".join(pieces).strip("\n") == generate(
        model, one._tokenizer, "<user>Why?\n<assistant>", add_special_tokens=False, max_new_tokens=12
    )
    assert len(pieces) > 1 and one.exchanges == [("Why?", "".join(pieces))]
    prompt = one._prompt(one.exchanges, "And then?")
    assert prompt.text == f"<user>Why?\n<assistant>{''.join(pieces).strip()}\n<user>And then?\n<assistant>"
    list(one.ask("And then?"))
    assert [asked for asked, _ in one.exchanges] == ["Why?", "And then?"]
    one.reset()
    assert one.exchanges == []


def test_an_answer_ends_before_the_stop_text_of_its_family(model):
    whole = "".join(chat(model, max_new_tokens=24).ask("Why?"))

    class Stops(LlamaFamily):
        stop_text = next(whole[n : n + 3] for n in range(8, len(whole)) if whole.index(whole[n : n + 3]) == n)

    one = chat(model, family=Stops, max_new_tokens=24)
    expected = whole.partition(Stops.stop_text)[0]
    assert "".join(one.ask("Why?")) == expected
    assert one.exchanges == [("Why?", expected)]


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("text", "expected"),
    [("ab\n### Human", "ab\n"), ("a ## b###", "a ## b"), ("a##", "a##"), ("###", ""), ("", ""), ("#a#b##", "#a#b##")],
)
def test_pieces_that_may_be_of_the_stop_text_are_held_back(text, expected, size):
    pieces = [text[n : n + size] for n in range(0, len(text), size)]
    found = list(before_text(iter(pieces), "###"))
    assert "".join(found) == expected and "" not in found
    assert list(before_text(iter(pieces), None)) == pieces


def test_a_closed_answer_stops_the_model_and_is_kept_as_far_as_it_came(model):
    one = chat(model, max_new_tokens=400)
    before = threading.active_count()
    pieces = one.ask("Why?")
    first = next(pieces)
    pieces.close()
    assert threading.active_count() == before and one.exchanges == [("Why?", first)]


def test_without_a_template_the_text_is_continued_and_a_family_may_have_a_format(model):
    plain = chat(model, template=None)
    assert plain.plain and not chat(model).plain
    assert plain._prompt([("Once", " upon")], "a time").text == "Once upon\na time"
    own = conversation_prompt(VicunaFamily(), tiny_models.tokenizer(), [("Hi", "Hello")], "Why?")
    assert own.text.endswith("ASSISTANT:") and "USER: Hi ASSISTANT: Hello</s>" in own.text


def test_a_conversation_beyond_the_models_positions_is_refused_and_not_kept(model):
    one = chat(model)
    with pytest.raises(DataError, match="tiny reads 512 with its answer; shorten the message, or begin anew"):
        list(one.ask("word " * 600))
    assert one.exchanges == []


def talk(monkeypatch, chats, lines):
    monkeypatch.setattr(api, "chat", lambda *_, **__: chats)
    return CliRunner().invoke(build_app(), ["chat", "a", "b"], input="\n".join(lines) + "\n")


def test_the_terminal_names_the_models_keeps_and_forgets(model, monkeypatch):
    chats = [chat(model, name="dense"), chat(model, name="pruned", template=None)]
    found = talk(monkeypatch, chats, ["Why?", "/nothing", "And then?"])
    assert found.exit_code == 0 and [len(one.exchanges) for one in chats] == [2, 2]
    assert found.output.count("dense") == 2 and chats[0].exchanges[0][1].strip() in found.output
    assert "'pruned' has no chat format: it continues the text" in found.output
    assert "no such command: /nothing" in found.output
    talk(monkeypatch, chats, ["/reset", "/quit", "never asked"])
    assert [one.exchanges for one in chats] == [[], []]


def test_a_failed_answer_to_a_pipe_ends_with_2_after_the_other_questions(model, monkeypatch):
    one = chat(model)
    found = talk(monkeypatch, [one], ["word " * 600, "Why?"])
    assert found.exit_code == 2 and [asked for asked, _ in one.exchanges] == ["Why?"]
    assert "shorten the message" in found.output


def test_an_interrupt_stops_one_answer_and_the_next_model_answers(model, monkeypatch):
    stopped, other = chat(model, name="stopped"), chat(model, name="other")
    real = stopped._pieces

    def interrupted(*given):
        yield next(iter(real(*given)))
        raise KeyboardInterrupt

    monkeypatch.setattr(stopped, "_pieces", interrupted)
    found = talk(monkeypatch, [stopped, other], ["Why?"])
    assert found.exit_code == 0 and "[…]" in found.output
    assert [len(one.exchanges) for one in (stopped, other)] == [1, 1]
    assert len(stopped.exchanges[0][1]) < len(other.exchanges[0][1])


def test_mistakes_are_refused(model, monkeypatch):
    with pytest.raises(SettingsError, match="--seed has no effect at --temperature 0"):
        api.chat("nowhere", seed=3)
    with pytest.raises(SettingsError, match="--port has no effect without --web"):
        build_app()(args=["chat", "demo", "--port", "1"], standalone_mode=False)


@pytest.fixture
def client(model):
    testing = pytest.importorskip("starlette.testclient")
    from llmpruner.chatting.web import chat_app

    chats = [chat(model, name="dense"), chat(model, name="pruned", template=None)]
    return testing.TestClient(chat_app(chats, 8123), base_url="http://127.0.0.1:8123")


def test_the_server_streams_the_answer_of_the_model_that_is_asked(client, model):
    assert client.get("/models").json() == [{"name": "dense", "plain": False}, {"name": "pruned", "plain": True}]
    page = client.get("/")
    assert "nonce" in page.headers["content-security-policy"] and "{{" not in page.text
    for number, one in enumerate((chat(model), chat(model, template=None))):
        exchanges = [["Hi", "Hello"]]
        found = client.post("/answer", json={"model": number, "exchanges": exchanges, "text": "Why?"})
        assert found.status_code == 200
        assert found.text == "".join(one.answer([("Hi", "Hello")], "Why?"))


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example:8123"},
        {"host": "127.0.0.1:9999"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "https://127.0.0.1:8123"},
        {"sec-fetch-site": "cross-site"},
    ],
)
def test_a_foreign_host_or_origin_is_refused(client, headers):
    question = {"model": 0, "exchanges": [], "text": "Why?"}
    assert client.post("/answer", json=question, headers=headers).status_code == 403
    assert client.get("/models", headers=headers).status_code == 403
    own = {"origin": "http://localhost:8123", "host": "localhost:8123", "sec-fetch-site": "same-origin"}
    assert client.get("/models", headers=own).status_code == 200


def test_what_is_no_question_is_refused(client):
    good = {"model": 0, "exchanges": [], "text": "Why?"}
    for change in ({"model": 2}, {"text": ""}, {"exchanges": "x"}, {"more": 1}):
        assert client.post("/answer", json={**good, **change}).status_code == 400
    plain = client.post("/answer", content='{"model": 0}', headers={"content-type": "text/plain"})
    assert plain.status_code == 415
    long = client.post("/answer", json={**good, "text": "word " * 600})
    assert long.status_code == 400 and "begin anew" in long.text


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_page_in_a_browser(model):
    """Two models, streaming, stop, second turn, reset."""
    pytest.importorskip("starlette")
    webdriver = pytest.importorskip("selenium.webdriver")
    from shutil import which

    from llmpruner.chatting.web import listen, serve

    if which("chromium") is None or which("chromedriver") is None:
        pytest.skip("no chromium")
    chats = [chat(model, name="dense", max_new_tokens=20), chat(model, name="pruned", max_new_tokens=480)]
    where = listen(0)
    threading.Thread(target=serve, args=(chats, where), daemon=True).start()
    options = webdriver.ChromeOptions()
    options.binary_location = which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(which("chromedriver")))

    def until(condition):
        end = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < end, browser.page_source
            time.sleep(0.01)

    def of(css):
        return browser.find_elements("css selector", css)

    def answers():
        return [element.get_property("textContent") for element in of(".answer")]

    def send(text):
        of("#text")[0].send_keys(text)
        of("#send")[0].click()

    try:
        browser.get(f"http://127.0.0.1:{where.getsockname()[1]}/")
        until(lambda: len(of("section")) == 2)
        send("Why?")
        until(lambda: len(answers()) == 2 and answers()[1])
        first, part = answers()
        assert first == "".join(chats[0].answer([], "Why?"))
        of("#stop")[0].click()
        until(of("#send")[0].is_enabled)
        stopped = answers()[1]
        whole = "".join(chats[1].answer([], "Why?"))
        assert whole.startswith(stopped) and len(part) <= len(stopped) < len(whole)
        send("And then?")
        until(lambda: len(answers()) == 4 and answers()[3])
        of("#stop")[0].click()
        until(of("#send")[0].is_enabled)
        assert answers()[1] == "".join(chats[0].answer([("Why?", first)], "And then?"))
        of("#reset")[0].click()
        assert answers() == []
        assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []
    finally:
        browser.quit()
