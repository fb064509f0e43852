"""The bank: what it keeps from one run, and what another run reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from two_subjects import PROMPTS, TWO, denoise, noise, pictures

from reattend.attn_processors import IsolationRepositionAttnProcessor, installed
from reattend.attn_processors.bank import Bank


def recorded(pipe: Any, method: IsolationRepositionAttnProcessor, bank: Bank, prompts: list[str]) -> None:
    recorder = replace(method, panels=(), source="record")
    with installed(pipe, recorder) as handle:
        recorder.cast(handle.parts[0][0]).bank = bank
        pictures(pipe, prompts)


@pytest.mark.parametrize("family", ["sd", "sdxl", "flux", "sd3"])
def test_a_bank_equals_rows(family, request):
    pipe = request.getfixturevalue(family)
    with installed(pipe, TWO):
        want = pictures(pipe, PROMPTS)[2:]
    bank = Bank()
    recorded(pipe, TWO, bank, PROMPTS[:2])
    method = replace(TWO, source="bank")
    generator = [torch.Generator().manual_seed(2)]
    with installed(pipe, method) as handle:
        method.cast(handle.parts[0][0]).bank = bank
        got = tiny.run(pipe, prompt=PROMPTS[2:], generator=generator)
        assert f"bank: {bank.held:,} bytes held, no limit, 0 times" in str(handle.report())
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-4)  # latents of several steps, with guidance


def test_a_full_bank_says_so(sd):
    with pytest.raises(MemoryError, match="bank of references would hold .* 1,000 are allowed"):
        recorded(sd, TWO, Bank(limit=1000), PROMPTS[:2])


def test_a_bank_of_other_steps_is_missed_and_counted(sd):
    bank = Bank()
    recorded(sd, TWO, bank, PROMPTS[:2])
    method = replace(TWO, source="bank")
    with installed(sd, method) as handle:
        method.cast(handle.parts[0][0]).bank = bank
        tiny.run(sd, prompt=PROMPTS[2:], num_inference_steps=3)
    assert bank.missing == 7  # the third step, in every layer


def test_a_bank_is_needed(unet):
    with installed(unet, replace(TWO, source="bank")), pytest.raises(RuntimeError, match="needs a bank"):
        denoise(unet, noise(2))
