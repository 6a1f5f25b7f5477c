"""Tokenizers with fewer tokens: text of the kept ones is tokenised as before, and any other text comes back."""

import copy
import json
import random
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    GemmaTokenizer,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    XGLMTokenizer,
)
from transformers.tokenization_utils_tokenizers import generate_merges

from llmpruner.errors import UnsupportedModelError
from llmpruner.models.save import save_tokenizer
from llmpruner.models.vocabulary import Vocabulary, removable_tokens, renumber, whole_first

DOCS = Path(__file__).parents[2] / "docs"
TEXT = "\n".join(
    [
        *(file.read_text(encoding="utf-8") for file in sorted((DOCS / "concepts").glob("*.md"))),
        *["Größe über alles, déjà vu; быстрая коричневая лиса прыгает; 模型预测下一个词。 日本語のテキスト 🙂🚀"] * 30,
    ]
)
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>"]
BYTES = [f"<0x{n:02X}>" for n in range(256)]
TEMPLATE = "{% for m in messages %}<|user|>{{ m.content }}</s><|late|>{% endfor %}"


def wrapped(backend):
    """With a post-processor, a chat template, and a token that was added after training."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
    )
    made.add_tokens(["<|late|>", "added word"])
    first, last = ((token, made.convert_tokens_to_ids(token)) for token in ("<s>", "<|late|>"))
    if isinstance(backend.decoder, decoders.ByteLevel):
        made._tokenizer.post_processor = processors.RobertaProcessing(last, first, trim_offsets=False)
    else:
        around = processors.TemplateProcessing("<s> $A <|late|>", "<s> $A $B <|late|>", [first, last])
        made._tokenizer.post_processor = around
    return made


def trained(backend, trainer, size, **options):
    options = {"special_tokens": SPECIAL, "show_progress": False, **options}
    backend.train_from_iterator([TEXT], trainer(vocab_size=size, **options))
    return backend


def changed(backend, change):
    spec = json.loads(backend.to_str())
    change(spec)
    return Tokenizer.from_str(json.dumps(spec))


def byte_level():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return trained(backend, trainers.BpeTrainer, 1200, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def as_llama_3():
    """Every pair of tokens that makes a third is merged, and a word that is a token needs no merges."""

    def change(spec):
        model = spec["model"]
        for word in ("Ġquantisation", "Ġpruning-time"):
            model["vocab"][word] = len(model["vocab"])
        model["merges"] = [list(pair) for pair in generate_merges(model["vocab"], skip_tokens=SPECIAL)]
        model["ignore_merges"] = True

    return changed(byte_level(), change)


def as_llama_2():
    """Bytes in place of unknown characters, several merges for a token, and no words."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special = [*SPECIAL, *BYTES]

    def change(spec):
        spec["added_tokens"] = spec["added_tokens"][: len(SPECIAL)]
        spec["pre_tokenizer"]["split"] = False
        vocabulary = spec["model"]["vocab"]
        spec["model"]["merges"] = [list(pair) for pair in generate_merges(vocabulary, skip_tokens=special)]

    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return changed(trained(backend, trainers.BpeTrainer, 1500, special_tokens=special, limit_alphabet=120), change)


def unigram():
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])

    def change(spec):
        spec["model"]["vocab"][len(SPECIAL) : len(SPECIAL)] = [[byte, 0.0] for byte in BYTES]
        spec["model"]["byte_fallback"] = True

    return changed(trained(backend, trainers.UnigramTrainer, 800, unk_token="<unk>"), change)


def word_piece():
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return trained(backend, trainers.WordPieceTrainer, 1000)


def as_gpt_1():
    """The last character of a word is another token than inside of it, and no merge makes it."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.BPEDecoder()
    return trained(backend, trainers.BpeTrainer, 900, end_of_word_suffix="</w>")


CLASSES = [
    (GPT2Tokenizer, byte_level),
    (LlamaTokenizer, as_llama_2),
    (GemmaTokenizer, as_llama_2),
    (XGLMTokenizer, unigram),
    (BertTokenizer, word_piece),
]
KINDS = [byte_level, as_llama_3, as_llama_2, as_gpt_1, unigram, word_piece]


@cache
def dense(kind):
    return wrapped(kind())


def kept_of(tokenizer, share, seed):
    """Ids without ``share`` of those that may go, chosen at random as selection chooses by scores."""
    generator = torch.Generator().manual_seed(seed)
    scores = whole_first(torch.rand(len(tokenizer), generator=generator, dtype=torch.float64), tokenizer)
    free = sorted(set(range(len(tokenizer))) - Vocabulary(tokenizer).required, key=lambda n: float(scores[n]))
    gone = set(free[: round(share * len(free))])
    assert gone
    return [n for n in range(len(tokenizer)) if n not in gone]


def phrases(tokenizer, kept, seed):
    """Pieces of the text, and texts of a few kept tokens."""
    rng = random.Random(seed)
    starts = [rng.randrange(len(TEXT)) for _ in range(3000)]
    texts = [TEXT[start : start + rng.randint(1, 16)] for start in starts]
    few = [[rng.choice(kept) for _ in range(rng.randint(1, 5))] for _ in range(3000)]
    return texts + tokenizer.batch_decode(few, clean_up_tokenization_spaces=False)


def strings(count):
    """Of all planes of Unicode, more often of usual characters."""
    rng = random.Random(0)
    ranges = [(32, 127)] * 4 + [(0, 0x250), (0x370, 0x600), (0x3000, 0xA000), (0x1F300, 0x1FA00), (0xE000, 0x110000)]
    texts = []
    for _ in range(count):
        low, high = rng.choice(ranges)
        texts.append(
            "".join(chr(rng.randrange(*rng.choice([(low, high), (97, 123)]))) for _ in range(rng.randint(0, 16)))
        )
    return texts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_text_of_kept_tokens_is_tokenised_as_before(kind, share):
    tokenizer = dense(kind)
    kept = kept_of(tokenizer, share, seed=1)
    trimmed, rows = Vocabulary(tokenizer).trimmed(kept), set(kept)
    assert len(trimmed) == len(kept) and tokenizer.backend_tokenizer.get_vocab_size() == len(tokenizer)
    compared, texts = 0, phrases(tokenizer, kept, seed=2)
    for text, before, after in zip(texts, *(each(texts)["input_ids"] for each in (tokenizer, trimmed)), strict=True):
        if rows.issuperset(before):
            compared += 1
            assert [kept[n] for n in after] == before, text
    assert compared > 500


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_comes_back(kind):
    tokenizer = dense(kind)
    trimmed = Vocabulary(tokenizer).trimmed(kept_of(tokenizer, 0.7, seed=3))
    texts = strings(10_000)
    before, after = (
        each.batch_decode(each(texts, add_special_tokens=False)["input_ids"], clean_up_tokenization_spaces=False)
        for each in (tokenizer, trimmed)
    )
    assert after == (texts if kind in (byte_level, as_llama_3) else before)


def as_class(cls, kind):
    """A class that builds its tokenizer from a vocabulary and merges, and the rest of ``tokenizer.json`` by rules."""
    model = json.loads(kind().to_str())["model"]
    merges = {"merges": [tuple(pair) for pair in model["merges"]]} if "merges" in model else {}
    unigrams = not merges and model["type"] != "WordPiece"
    vocabulary = [tuple(entry) for entry in model["vocab"]] if unigrams else model["vocab"]
    made = cls(vocab=vocabulary, **merges, bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=True)
    made.add_tokens(["<|user|>", "<|late|>"], special_tokens=True)
    made.chat_template = TEMPLATE
    return made


@pytest.mark.parametrize(
    "make", [*(partial(dense, kind) for kind in KINDS), *(partial(as_class, *each) for each in CLASSES)]
)
def test_a_saved_tokenizer_is_the_same_but_for_its_ids(make, tmp_path):
    tokenizer = make()
    kept = kept_of(tokenizer, 0.5, seed=4)
    (tmp_path / "tokenizer.model").touch()
    tokenizer.vocab_file = str(tmp_path / "tokenizer.model")
    trimmed = Vocabulary(tokenizer).trimmed(kept)
    save_tokenizer(trimmed, tmp_path / "trimmed")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "trimmed")
    assert type(loaded) is type(tokenizer) or type(loaded).__name__ == "TokenizersBackend"
    before = {token: kept[number] for token, number in loaded.get_vocab().items()}
    assert before.items() <= tokenizer.get_vocab().items()
    assert len(loaded) == len(kept) and loaded.special_tokens_map == tokenizer.special_tokens_map
    one, other = (
        {(t.content, t.special, t.lstrip, t.rstrip, t.single_word, t.normalized) for t in added}
        for added in (each.added_tokens_decoder.values() for each in (loaded, tokenizer))
    )
    assert one == other
    assert {file.name for file in (tmp_path / "trimmed").iterdir()} == {
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
    }  # fmt: skip
    letters = tokenizer.decode([n for n in kept if n not in tokenizer.all_special_ids][:3])
    chat = [{"role": "user", "content": letters}]
    for before, after in (
        (tokenizer(letters, letters), loaded(letters, letters)),
        (tokenizer.apply_chat_template(chat, return_dict=True), loaded.apply_chat_template(chat, return_dict=True)),
    ):
        assert [kept[n] for n in after["input_ids"]] == before["input_ids"]


def test_padding_and_tokens_without_a_row_get_new_ids_too():
    """Vicuna has a padding token that its embedding lacks."""
    tokenizer = copy.deepcopy(dense(byte_level))
    tokenizer.pad_token = "<|late|>"
    tokenizer(["a", "a b"], padding=True)
    kept = [n for n in kept_of(tokenizer, 0.5, seed=5) if n < tokenizer.convert_tokens_to_ids("<|late|>")]
    trimmed = Vocabulary(tokenizer).trimmed(kept)
    assert trimmed.pad_token_id == len(kept) == trimmed.backend_tokenizer.padding["pad_id"]
    assert trimmed.convert_tokens_to_ids("added word") == len(kept) + 1 == len(trimmed) - 1


def test_configurations_and_modules_name_the_new_ids():
    model = LlamaForCausalLM(small_llama(pad_token_id=8, eos_token_id=[2, 40]))
    model.config.image_token_id, model.config.unused_token_index = 30, -1
    model.generation_config.suppress_tokens = [7, 30, 41]
    kept = [2, 8, 30, 40]
    renumber(model, kept, 64)
    assert (model.config.pad_token_id, model.config.eos_token_id, model.config.bos_token_id) == (1, [0, 3], None)
    assert (model.config.image_token_id, model.config.unused_token_index, model.config.vocab_size) == (2, -1, 4)
    assert (model.generation_config.eos_token_id, model.generation_config.suppress_tokens) == ([0, 3], [2])
    assert (model.model.padding_idx, model.vocab_size, model.model.embed_tokens.padding_idx) == (1, 4, 1)


def test_parts_of_tokens_that_a_configuration_names_stay():
    tokenizer = dense(as_llama_3)
    vocabulary = Vocabulary(tokenizer)
    whole, parts = vocabulary.longest_first()[0]
    model = LlamaForCausalLM(small_llama(vocab_size=len(tokenizer) + 7, eos_token_id=whole))
    free = removable_tokens(model, tokenizer)
    assert not {whole, *parts} & free and not vocabulary.required & free
    assert set(range(len(tokenizer), len(tokenizer) + 7)) < free


def small_llama(**changes):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaConfig(**{"vocab_size": 64, **sizes, **changes})


@pytest.mark.parametrize(("tokenizer", "line"), [(None, "it has no tokenizer"), (object(), "it has a object")])
def test_what_cannot_be_rewritten_is_refused(tokenizer, line):
    with pytest.raises(UnsupportedModelError, match=line):
        Vocabulary(tokenizer)
