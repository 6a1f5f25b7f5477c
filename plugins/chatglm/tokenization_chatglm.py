"""Tokenizer of ChatGLM-6B. Imports sentencepiece and transformers alone: it is copied into checkpoints."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, ClassVar

import sentencepiece
from transformers import PreTrainedTokenizer

VOCABULARY_FILE = "ice_text.model"
_LINE_BREAK, _TAB = "<n>", "<|tab|>"


class ChatGLMTokenizer(PreTrainedTokenizer):
    """SentencePiece over ``ice_text.model``, where a line break is ``<n>``, a tab ``<|tab|>`` and 2 to 80 blanks are
    one ``<|blank_k|>``.

    ``[gMASK] <sop>`` is added to prompts that do not contain ``<sop>``. Padding is on the left. ``num_image_tokens``:
    ids reserved before those of text (20000 in old releases).
    """

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": VOCABULARY_FILE}
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(
        self,
        vocab_file: str,
        bos_token: str = "<sop>",
        eos_token: str = "<eop>",
        end_token: str = "</s>",
        mask_token: str = "[MASK]",
        gmask_token: str = "[gMASK]",
        pad_token: str = "<pad>",
        unk_token: str = "<unk>",
        num_image_tokens: int = 0,
        **kwargs: Any,
    ) -> None:
        self.vocab_file = vocab_file
        self.end_token = end_token
        self.gmask_token = str(gmask_token)
        self.num_image_tokens = num_image_tokens
        self.sp_model = sentencepiece.SentencePieceProcessor(model_file=str(vocab_file))
        kwargs.pop("extra_special_tokens", None)
        kwargs.setdefault("padding_side", self.padding_side)
        super().__init__(
            bos_token=bos_token,
            eos_token=eos_token,
            end_token=end_token,
            mask_token=mask_token,
            gmask_token=self.gmask_token,
            pad_token=pad_token,
            unk_token=unk_token,
            num_image_tokens=num_image_tokens,
            extra_special_tokens=[self.gmask_token],
            **kwargs,
        )

    @property
    def vocab_size(self) -> int:
        return self.num_image_tokens + self.sp_model.get_piece_size()

    @property
    def gmask_token_id(self) -> int:
        return self.convert_tokens_to_ids(self.gmask_token)

    def get_vocab(self) -> dict[str, int]:
        vocabulary = {self._convert_id_to_token(i): i for i in range(self.vocab_size)}
        return {**vocabulary, **self._added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        text = text.replace("\n", _LINE_BREAK).replace("\t", _TAB)
        text = re.sub(" {2,80}", lambda blanks: f"<|blank_{len(blanks.group())}|>", text)
        return self.sp_model.encode(text, out_type=str)

    def _convert_token_to_id(self, token: str) -> int:
        if (image := re.fullmatch(r"<image_(\d+)>", token)) and int(image[1]) < self.num_image_tokens:
            return int(image[1])
        return self.num_image_tokens + self.sp_model.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        if index < self.num_image_tokens:
            return f"<image_{index}>"
        piece = index - self.num_image_tokens
        # The embedding has rows beyond the vocabulary; a model may still sample one.
        return self.sp_model.id_to_piece(piece) if piece < self.sp_model.get_piece_size() else str(self.unk_token)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        text = self.sp_model.decode_pieces(tokens)
        text = text.replace(_LINE_BREAK, "\n").replace(_TAB, "\t")
        return re.sub(r"<\|blank_(\d+)\|>", lambda blanks: " " * int(blanks[1]), text)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """``token_ids_0 [gMASK] <sop>``, then ``token_ids_1 <eop>`` when there are any."""
        prompt = (
            token_ids_0 if self.bos_token_id in token_ids_0 else [*token_ids_0, self.gmask_token_id, self.bos_token_id]
        )
        return prompt if token_ids_1 is None else [*prompt, *token_ids_1, self.eos_token_id]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        target = Path(save_directory) / (prefix + VOCABULARY_FILE)
        if Path(self.vocab_file).resolve() != target.resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)


ChatGLMTokenizer.register_for_auto_class()
