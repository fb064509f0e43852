from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from reattend.emoji_world import captions, clauses, train_flux, world


def labels_of(caption: str) -> list[tuple[str, str, int, int]]:
    """Kind, tint ("" for none), place and count of every token that has labels, in words."""
    tokenizer = captions.build_t5_tokenizer()
    ids = torch.from_numpy(captions.tokenize(tokenizer, [caption], 24))
    labels = {name: each[0] for name, each in clauses.word_labels(tokenizer, [caption], ids).items()}
    told = (labels["kind"] != clauses.UNTOLD).nonzero().flatten().tolist()
    assert all((each[k] == clauses.UNTOLD) == (k not in told) for each in labels.values() for k in range(24))
    tints = ["", *world.TINTS]
    return [
        (world.KINDS[labels["kind"][k]], tints[labels["tint"][k]], int(labels["place"][k]), 1 + int(labels["count"][k]))
        for k in told
    ]


def test_nouns_and_tints_carry_their_clause() -> None:
    assert labels_of("a cat on sand") == [("cat", "", 0, 1)]
    first, second, third = ("car", "blue", 0, 3), ("car", "", 1, 3), ("apple", "red", 2, 3)
    assert labels_of("a blue car and a car and a red apple on sea") == [first, first, second, third, third]
    assert labels_of("") == []


def test_words_that_tell_nothing_cost_nothing() -> None:
    tokenizer, head = captions.build_t5_tokenizer(), clauses.ClauseHead(8)
    ids = torch.from_numpy(captions.tokenize(tokenizer, ["", ""], 24))
    loss = head(torch.randn(2, 24, 8), clauses.word_labels(tokenizer, ["", ""], ids))
    assert loss == 0
    loss.backward()  # and is no obstacle
    assert all((p.grad == 0).all() for p in head.parameters())


def test_t5_learns_to_read_on_captions_alone(vae_folder: Path, tmp_path: Path) -> None:
    config = train_flux.FluxConfig(vae=vae_folder, out=tmp_path / "run", text_steps=300)
    trainer = train_flux.FluxTrainer(config)
    transformer = {name: p.clone() for name, p in trainer.parts["transformer"].named_parameters()}
    assert right(trainer) < 0.3
    trainer.learn_to_read()
    assert right(trainer) > 0.9  # of captions it has not seen; 0.99 was measured
    assert all(torch.equal(p, transformer[name]) for name, p in trainer.parts["transformer"].named_parameters())


def test_every_process_learns_to_read_the_same(vae_folder: Path, tmp_path: Path) -> None:
    config = train_flux.FluxConfig(vae=vae_folder, out=tmp_path / "run", text_steps=10)
    one, other = train_flux.FluxTrainer(config), train_flux.FluxTrainer(config)
    one.learn_to_read()
    other.learn_to_read()
    for a, b in zip(one.parameters, other.parameters, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)  # kernels sum in an order that depends on where memory lies


@torch.no_grad()
def right(trainer: train_flux.FluxTrainer) -> float:
    """Share of held-out nouns whose tint and place are both told right."""
    tokenizer, words = trainer.t5_tokenizer, world.sample_captions(np.random.default_rng(1), 200)
    ids = torch.from_numpy(captions.tokenize(tokenizer, words, 24))
    labels = clauses.word_labels(tokenizer, words, ids)
    hidden = trainer.parts["text_encoder_2"](ids).last_hidden_state
    found = [
        trainer.parts["clauses"].classifiers[name](hidden).argmax(-1) == labels[name] for name in ("tint", "place")
    ]
    told = labels["kind"] != clauses.UNTOLD
    return float((found[0] & found[1])[told].double().mean())
