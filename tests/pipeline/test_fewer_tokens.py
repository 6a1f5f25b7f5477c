"""Tokens of a tiny model with a trained tokenizer, removed alone and with MLP channels; and what is told of the cut."""

import json
from pathlib import Path

import pytest
import torch
from fresh import run_fresh
from tokenizers import ByteLevelBPETokenizer, Tokenizer, decoders
from tokenizers.models import BPE
from transformers import AutoTokenizer, GPT2Tokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmpruner import TokenStats, api, load_pruned
from llmpruner.engine.walk import CalibrationSet
from llmpruner.errors import PlanError, SelectionError, SettingsError, UnsupportedModelError
from llmpruner.models.vocabulary import Vocabulary
from llmpruner.pruning import saving
from llmpruner.pruning.criteria.whole import TokenUse
from llmpruner.structure.outcome import ScriptTokens, TextTokens
from llmpruner.structure.plan import GroupCut
from llmpruner.testing.models import letters

ROWS = 768  # of the embedding; a few more than tokens
PROBE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
assert "llmpruner" not in sys.modules
model, tokenizer = (each.from_pretrained(sys.argv[1]) for each in (AutoModelForCausalLM, AutoTokenizer))
ids = tokenizer(sys.argv[3], return_tensors="pt").input_ids
with torch.no_grad():
    torch.save({"ids": ids, "logits": model.eval()(ids).logits}, sys.argv[2])
made = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=model.config.eos_token_id)
assert made.max() < len(tokenizer) and model.config.vocab_size == model.get_output_embeddings().weight.shape[0]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in ``dense``, and texts: ``text.txt``, English, and ``russian.txt``."""
    folder = tmp_path_factory.mktemp("tokens")
    docs = sorted((Path(__file__).parents[2] / "docs" / "concepts").glob("*.md"))
    english = "\n".join(file.read_text(encoding="utf-8") for file in docs)
    russian = "Быстрая коричневая лиса прыгает через ленивую собаку, а модель предсказывает следующее слово. " * 10
    (folder / "text.txt").write_text(english, encoding="utf-8")
    (folder / "russian.txt").write_text(russian, encoding="utf-8")
    base = ByteLevelBPETokenizer()
    base.train_from_iterator([english, russian], vocab_size=760, special_tokens=["<s>", "</s>"], show_progress=False)
    spec = json.loads(base.to_str())["model"]
    merges = [tuple(pair) for pair in spec["merges"]]
    tokenizer = GPT2Tokenizer(vocab=spec["vocab"], merges=merges, bos_token="<s>", eos_token="</s>", unk_token="</s>")
    tokenizer.add_tokens(["<|end|>"], special_tokens=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ROWS, hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=[1, tokenizer.convert_tokens_to_ids("<|end|>")],
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    model.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    return folder


def prune(folder: Path, output: Path | None = None, **changes):
    options = {"kinds": "vocabulary", "calibration": str(folder / "text.txt"), "samples": 16, "length": 32, **changes}
    if output is None:
        return api.plan(str(folder / "dense"), **options)
    return api.prune(str(folder / "dense"), output=output, **options)


def kept_of(plan) -> tuple[int, ...]:
    return plan.cuts["vocabulary"].kept


def tokens(number: int, **settings) -> dict[str, object]:
    return {"settings": {"vocabulary": {"tokens": number, **settings}}}


def test_text_of_kept_tokens_gets_the_same_logits(folder, tmp_path):
    pruned = prune(folder, tmp_path / "out", **tokens(448))
    kept = kept_of(pruned.plans[-1])
    dense, tokenizer = (c.from_pretrained(folder / "dense") for c in (LlamaForCausalLM, AutoTokenizer))
    words = [f" {word}" for word in (folder / "text.txt").read_text(encoding="utf-8").split()]
    text = "".join([word for word in words if set(tokenizer(word)["input_ids"]) <= set(kept)][:40])
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = dense.eval()(ids).logits[..., list(kept)]
    found = run_fresh(PROBE, tmp_path / "out", tmp_path / "result.pt", text)
    assert found.returncode == 0, found.stderr
    result = torch.load(tmp_path / "result.pt")
    assert torch.tensor(kept)[result["ids"]].tolist() == ids.tolist() and ids.shape[1] > 40
    torch.testing.assert_close(result["logits"], expected)

    loaded = load_pruned(tmp_path / "out")
    assert loaded.config.vocab_size == len(kept) == 448 and len(set(range(ROWS)) - set(kept)) == ROWS - 448
    eos = [kept.index(1), kept.index(len(tokenizer) - 1)]
    assert loaded.config.eos_token_id == eos == loaded.generation_config.eos_token_id
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 448
    assert not [n for n in kept if n >= len(tokenizer)], "rows without a token go first"
    assert api.verify_checkpoint(tmp_path / "out").damage == ()


def test_the_result_can_be_pruned_again(folder, tmp_path):
    prune(folder, tmp_path / "dense", **tokens(512))
    pruned = prune(tmp_path, tmp_path / "twice", **tokens(448), calibration=str(folder / "text.txt"))
    first, second = map(kept_of, pruned.plans)
    kept = [first[number] for number in second]
    dense, tokenizer = (c.from_pretrained(folder / "dense") for c in (LlamaForCausalLM, AutoTokenizer))
    torch.testing.assert_close(pruned.network.lm_head.weight, dense.lm_head.weight[kept])
    assert pruned.tokenizer.convert_ids_to_tokens(range(448)) == tokenizer.convert_ids_to_tokens(kept)


def test_channels_and_tokens_share_a_budget_of_bytes(folder, tmp_path):
    pruned = prune(folder, tmp_path / "out", kinds="mlp,vocabulary", budget="bytes", ratio=0.2)
    plan = pruned.plans[-1]
    assert (plan.selection.allocation, plan.target.budget) == ("sensitivity", "bytes")
    left, channels = len(kept_of(plan)), {len(plan.cuts[f"layers.{n}.mlp"].kept) for n in range(3)}
    assert left < ROWS and left % 64 == 0 and len(channels) == 1
    dense = LlamaForCausalLM.from_pretrained(folder / "dense").num_parameters()
    assert 1 - load_pruned(tmp_path / "out").num_parameters() / dense == pytest.approx(0.2, abs=0.03)


def test_a_block_of_layers_goes_next_to_tokens(folder):
    """Its length was that of the vocabulary, the first of the two groups."""
    plan = prune(folder, None, kinds="layer,vocabulary", importance="angular-block", budget="bytes", ratio=0.2)
    assert plan.cuts.keys() <= {"layers", "vocabulary"}


def test_a_plan_records_the_text_on_which_tokens_alone_were_scored(folder):
    options = {"kinds": "mlp,vocabulary", "importance": "l2", "allocation": "uniform", "budget": "bytes", "ratio": 0.2}
    assert prune(folder, None, **options).estimation.calibration == str(folder / "text.txt")


@pytest.mark.parametrize(("changes", "error", "line"), [
    ({"ratio": 0.2}, SelectionError, r"tokens save nothing of the .*; count by --budget parameters or bytes"),
    (tokens(100), SelectionError, r"vocabulary\.tokens=100: the model has 768 tokens, of which 25\d must stay"),
    (tokens(768), SelectionError, r"vocabulary\.tokens=768: the model has 768 tokens"),
    (tokens(760), SelectionError, "the number of tokens that stay is a multiple of 64; ask for fewer"),
    ({**tokens(448), "ratio": 0.2}, SettingsError, r"vocabulary\.tokens says how much to remove by itself"),
    ({**tokens(448), "kinds": "mlp,vocabulary"}, SettingsError, r"with --kinds vocabulary and no other"),
    ({"ratio": 0.2, "budget": "bytes", "steps": 2}, SettingsError, r"tokens go in one step"),
    ({"ratio": 0.2, "budget": "bytes", "importance": "l2"}, SelectionError, "l2 does not score 'vocabulary'"),
])  # fmt: skip
def test_what_cannot_be_done_is_refused_in_one_line(folder, changes, error, line):
    with pytest.raises(error, match=line) as caught:
        prune(folder, None, **changes)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_cannot_be_rewritten_is_refused_before_weights_are_read(folder, tmp_path, monkeypatch):
    LlamaForCausalLM.from_pretrained(folder / "dense").save_pretrained(tmp_path / "dense")
    letters().save_pretrained(tmp_path / "dense")
    monkeypatch.setattr("llmpruner.discovery.opening.Opener.weights", None)
    with pytest.raises(UnsupportedModelError, match="tokens cannot be removed from a WordLevel tokenizer"):
        prune(tmp_path, None, **tokens(448), calibration=str(folder / "text.txt"))


def test_a_plan_that_lost_a_token_it_needs_is_refused(folder, tmp_path, monkeypatch):
    plan = prune(folder, None, **tokens(448))
    cut = plan.cuts["vocabulary"]
    edited = plan.model_copy(update={"cuts": {"vocabulary": cut.model_copy(update={"kept": cut.kept[1:]})}})
    monkeypatch.setattr("llmpruner.discovery.opening.Opener.weights", None)
    with pytest.raises(PlanError, match="the plan removes 1 tokens that others or the tokenizer need, first 0"):
        api.prune(str(folder / "dense"), plan=edited, output=tmp_path / "out")


def test_texts_and_scripts_to_keep_have_an_effect(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "dense")
    text = (folder / "russian.txt").read_text(encoding="utf-8")
    before = tokenizer(text)["input_ids"]

    def kept(number: int, **own: str) -> tuple[int, ...]:
        return kept_of(prune(folder, None, **tokens(number, **own)))

    def share(*args: int, **own: str) -> float:
        return len(set(before) & set(kept(*args, **own))) / len(set(before))

    assert share(512) < share(512, keep=str(folder / "russian.txt")) == 1
    assert share(640, scripts="latin") < share(640) == share(640, scripts="latin,cyrillic") == 1
    rows = kept(448, keep=str(folder / "russian.txt"))  # the words, and what they are made of
    assert [rows[number] for number in Vocabulary(tokenizer).trimmed(rows)(text)["input_ids"]] == before


def test_a_streamed_model_gives_the_same_files(folder, tmp_path, monkeypatch):
    for way in ("resident", "streamed"):
        free = 0 if way == "streamed" else 1 << 50
        monkeypatch.setattr("llmpruner.pruning.forecast.free_memory", lambda _, free=free: free)
        made = prune(folder, tmp_path / way, **tokens(448))
        assert (made.streamed is not None) == (way == "streamed")
    one, other = ({file.name: file for file in (tmp_path / way).iterdir()} for way in ("resident", "streamed"))
    same = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    assert all(one[name].read_bytes() == other[name].read_bytes() for name in same)
    ours, theirs = (load_pruned(tmp_path / way).state_dict() for way in ("resident", "streamed"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    tokens = ["a", "b", "c", "д", "а", ".", "!", "ab", "да", "abc"]
    merges = [("a", "b"), ("д", "а"), ("ab", "c")]
    backend = Tokenizer(BPE({token: number for number, token in enumerate(tokens)}, merges))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_scripts_and_text_of_a_cut_by_hand(tokenizer, monkeypatch):
    monkeypatch.setattr(saving, "SCRIPTS", 2)
    ids = torch.tensor([[7, 9]] * 7 + [[8, 7]])  # ababc; the eighth that is not counted: даab
    cut = GroupCut(kind="vocabulary", units=11, kept=range(8))
    found = saving.token_outcome(tokenizer, cut, CalibrationSet(ids, "by hand"))
    assert (found.before, found.after) == (11, 8)
    assert found.scripts == (
        ScriptTokens("LATIN", 5, 1, ("abc",)), ScriptTokens("CYRILLIC", 3, 1, ("да",)), ScriptTokens("other", 3, 1, ()),
    )  # fmt: skip
    assert found.texts == {"counted": TextTokens(14, 7, 5 / 2, 5 / 3), "held_out": TextTokens(2, 1, 6 / 2, 6 / 3)}
    assert ("held-out text", "3.00 bytes per token before, 2.00 after", "1", "2", "50.00%") in found.table()[1]
    assert saving.token_outcome(tokenizer, cut, None).scripts == found.scripts


def test_tokens_that_the_model_has_no_row_for_have_no_score(tokenizer, tmp_path):
    """As a padding token that was added to the tokenizer alone."""
    (tmp_path / "keep.txt").write_text("ab!")
    use = TokenStats(torch.ones(8, dtype=torch.int64), torch.zeros(8, dtype=torch.float64), 8, tokenizer)
    plain, chosen = (TokenUse(**own).score_tokens(use) for own in ({}, {"keep": str(tmp_path / "keep.txt")}))
    assert ((chosen - plain).nonzero().flatten().tolist()) == [6, 7]
    foreign = TokenUse(scripts="latin").score_tokens(use) < plain / 2
    assert foreign.nonzero().flatten().tolist() == [3, 4]
