"""The tokenizers and text encoders of the bundled models: CLIP, and T5 beside it for tiny-flux.

Byte-pair merges are learned from captions, so every word of the world is one token and other text still has tokens.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from . import world

MAX_LENGTH = 32  # tokens with start and end; the longest caption of the world has 17
T5_LENGTH = 64  # words of the world are one token each; others are spelled
WIDTH = 128


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE with the merges that spell the words of the world."""
    words = sorted({*world.KINDS, *world.TINTS, *world.BACKGROUNDS, "a", "an", "and", "on"})
    merges = learn_merges(words)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    pieces = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges, model_max_length=MAX_LENGTH)


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make one piece of every word: the most frequent pair first, of equals the first by letters.

    The tokenizers library breaks ties by the order of a hash table, so two processes would number words differently.
    """
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for pieces in spelled for pair in pairwise(pieces)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = [_merged(pieces, best) for pieces in spelled]
    return merges


def _merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """The pieces with every occurrence of the pair made one."""
    done: list[str] = []
    for piece in pieces:
        if done and (done[-1], piece) == pair:
            done[-1] += piece
        else:
            done.append(piece)
    return done


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two causal layers: a kind's token sees its tint, the last token sees the whole caption."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=MAX_LENGTH, projection_dim=WIDTH, hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPTextModel(config)


def build_t5_tokenizer() -> T5Tokenizer:
    """T5's unigram tokenizer: every word of the world is one piece, and other ASCII text is spelled."""
    words = sorted({*world.KINDS, *world.TINTS, *world.BACKGROUNDS, "a", "an", "and", "on"})
    letters = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -1.0) for word in words] + [(letter, -10.0) for letter in letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=T5_LENGTH)


def build_t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """Two layers of the same width as the CLIP encoder's."""
    config = T5Config(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=32, d_ff=4 * WIDTH, num_layers=2, num_heads=4, dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return T5EncoderModel(config)


def tokenize(tokenizer: CLIPTokenizer | T5Tokenizer, captions: list[str], length: int = MAX_LENGTH) -> np.ndarray:
    """Padded token ids, shape (len(captions), length), as the stock pipelines make them."""
    return tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="np").input_ids
