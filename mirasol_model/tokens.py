"""Prompts and answers as tokens, by any tokenizer of the `tokenizers` library; by default one token per byte."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mirasol_model.config import TextConfig

try:
    from tokenizers import Tokenizer, decoders, models
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("text needs tokenizers: pip install 'mirasol-kernels[model]'") from error


def byte_tokenizer() -> Tokenizer:
    """Token 3 + b is byte b of the UTF-8 text; 0, 1 and 2 are pad, eos and unknown, which no text contains.

    The numbers are those of the byte presets (`config.BYTES`).
    """
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


class Text:
    """A prompt is [pad, its tokens], an answer is [its tokens, eos]; a row of text is both, one after the other.

    The leading pad, as in T5's decoder, gives an empty prompt something to be predicted from.
    """

    def __init__(self, config: TextConfig, file: str | Path | None = None):
        """file: a tokenizer.json; what it says of truncation and padding is left out.

        ValueError where it has more tokens than config.vocabulary, or where pad or eos of the configuration are words.
        """
        self.config = config
        if file is not None and not Path(file).is_file():
            raise ValueError(f"config: model.tokenizer: expected a tokenizer.json, got no file {str(file)!r}")
        self.tokenizer = byte_tokenizer() if file is None else Tokenizer.from_file(str(file))
        largest = max(self.tokenizer.get_vocab().values())
        if largest >= config.vocabulary:
            raise ValueError(
                f"config: model.tokenizer: expected tokens below text.vocabulary {config.vocabulary}, got {largest}"
            )
        # A file may say to cut or to fill up everything it encodes, which would change what is asked and answered.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        for name in ("pad", "eos"):
            token = getattr(config, name)
            if self._is_text(token):
                raise ValueError(
                    f"config: text.{name}: expected a token that is in no text, got {token}, which is "
                    f"{self.tokenizer.id_to_token(token)!r} in {file}"
                )

    def prompt(self, words: str) -> list[int]:
        return [self.config.pad, *self._tokens(words)]

    def answer(self, words: str) -> list[int]:
        return [*self._tokens(words), self.config.eos]

    def words(self, tokens: Sequence[int]) -> str:
        """What an answer says: up to its eos, without pads and the -1 of `generate_tokens`."""
        tokens = list(tokens)
        end = tokens.index(self.config.eos) if self.config.eos in tokens else len(tokens)
        return self.tokenizer.decode([token for token in tokens[:end] if self._says(token)])

    def words_of(self, tokens: Iterable[int]) -> Iterator[str]:
        """What an answer says, piece by piece as its tokens come: a piece ends where a character does. In all that is
        `words`, unless bytes are in it that are no UTF-8."""
        stream = decoders.DecodeStream(skip_special_tokens=True)
        so_far: list[int] = []
        said = ""
        for token in tokens:
            if token == self.config.eos:
                break
            if not self._says(token):
                continue
            so_far.append(token)
            try:
                piece = stream.step(self.tokenizer, token) or ""
                said += piece
            except Exception:  # its only type, where bytes that seemed to be a character turn out not to be one
                whole = self.words(so_far)
                piece, said = whole[len(said) :], whole
                stream = decoders.DecodeStream(skip_special_tokens=True)
                stream.step(self.tokenizer, token)  # so that what follows is spaced as after this token
            if piece:
                yield piece
        whole = self.words(so_far)
        if len(whole) > len(said) and whole.startswith(said):  # bytes at the end that are no character
            yield whole[len(said) :]

    def _says(self, token: int) -> bool:
        return token >= 0 and token != self.config.pad

    def _is_text(self, token: int) -> bool:
        """Whether ordinary text has this token in it: it is not an added one, and what it says is encoded with it."""
        word = self.tokenizer.id_to_token(token)
        if word is None or token in self.tokenizer.get_added_tokens_decoder():
            return False
        said = self.tokenizer.decode([token], skip_special_tokens=False)
        return any(token in self._tokens(words) for words in (word, said))

    def _tokens(self, words: str) -> list[int]:
        return self.tokenizer.encode(words, add_special_tokens=False).ids
