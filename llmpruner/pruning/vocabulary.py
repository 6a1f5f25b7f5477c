"""What a cut of the vocabulary does to text: the tokens that go, by script, and the text that is made of them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from ..models.vocabulary import Vocabulary
from ..structure.plan import ScriptTokens, TextTokens, TokenOutcome
from .criteria.tokens import scripts_of, texts_of
from .selection import counted_part

if TYPE_CHECKING:
    from ..calibration.calibration import CalibrationSet
    from ..structure.plan import GroupCut

SCRIPTS: Final = 6
"""Those with most tokens; others are counted together."""


def token_outcome(tokenizer: Any, cut: GroupCut, text: CalibrationSet | None) -> TokenOutcome:
    """``cut``: of the tokens of ``tokenizer``. ``text``: what they were chosen on; None where none was read."""
    kept = frozenset(cut.kept)
    pieces = texts_of(tokenizer)[: cut.units]
    pieces += [""] * (cut.units - len(pieces))  # rows that no token has
    scripts = [min(scripts_of(piece), default="no letters") for piece in pieces]
    largest = dict(Counter(scripts).most_common(SCRIPTS))
    scripts = [script if script in largest else "other" for script in scripts]
    used = Counter[int]() if text is None else Counter(text.input_ids.flatten().tolist())
    gone = sorted(frozenset(range(cut.units)) - kept, key=lambda token: (-used[token], token))
    rows = []
    for script, number in Counter(scripts).most_common():
        lost = [pieces[token] for token in gone if scripts[token] == script]
        shown = [piece for piece in lost if 0 < len(piece) <= 16 and "\ufffd" not in piece]
        rows.append(ScriptTokens(script, number, len(lost), tuple(shown[:8])))
    texts = {}
    if text is not None:
        trimmed, counted = Vocabulary(tokenizer).trimmed(kept), counted_part(text).input_ids
        for name, ids in (("counted", counted), ("held_out", text.input_ids[len(counted) :])):
            if len(ids):
                written = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                before, after = (_bytes_per_token(written, each) for each in (tokenizer, trimmed))
                tokens = ids.flatten().tolist()
                texts[name] = TextTokens(len(tokens), sum(token not in kept for token in tokens), before, after)
    return TokenOutcome(cut.units, len(kept), tuple(rows), texts)


def _bytes_per_token(texts: list[str], tokenizer: Any) -> float:
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return len("".join(texts).encode()) / max(1, sum(map(len, ids)))
