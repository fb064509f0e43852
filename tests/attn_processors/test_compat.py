"""The user's attention backend, and the ones that cannot run here."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import tiny
import torch
from diffusers import attention_backend
from diffusers.models import attention_dispatch
from small_methods import Exact

from reattend.attn_processors import BackendUnavailable, install
from reattend.attn_processors.compat import require_backend, why_not_xformers

Registry, Name = attention_dispatch._AttentionBackendRegistry, attention_dispatch.AttentionBackendName


@pytest.fixture(autouse=True)
def default_backend():
    before = Registry._active_backend
    yield
    Registry.set_active_backend(before)  # set_attention_backend changes the whole process


@pytest.fixture
def calls(monkeypatch):
    """How often each backend was called."""
    counts: dict[str, int] = {}
    for name, function in list(Registry._backends.items()):

        def counted(*args, _name=name.value, _function=function, **kwargs):
            counts[_name] = counts.get(_name, 0) + 1
            return _function(*args, **kwargs)

        monkeypatch.setitem(Registry._backends, name, counted)
    return counts


def test_default_is_native(unet, calls):
    install(unet, Exact())
    tiny.denoise(unet)
    assert calls == {"native": 7}


def test_set_attention_backend_after_installing(unet, calls):
    want = tiny.denoise(unet)
    handle = install(unet, Exact())
    unet.set_attention_backend("_native_math")
    Registry.set_active_backend(Name.NATIVE)  # so that only the layers' own wish is left
    torch.testing.assert_close(tiny.denoise(unet), want, atol=1e-5, rtol=0)
    assert calls == {"_native_math": 7}
    handle.remove()


def test_set_attention_backend_before_installing(unet, calls):
    unet.set_attention_backend("_native_math")
    install(unet, Exact())
    tiny.denoise(unet)
    assert calls == {"_native_math": 7}


def test_context_manager(unet, calls):
    install(unet, Exact())
    with attention_backend("_native_math"):
        tiny.denoise(unet)
    tiny.denoise(unet)
    assert calls == {"_native_math": 7, "native": 7}


def test_a_backend_set_on_stock_goes_to_ours_and_back(unet):
    attn = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    stock = attn.processor
    stock._attention_backend = Name._NATIVE_MATH
    handle = install(unet, Exact(), layers="^mid")
    assert attn.processor._attention_backend == Name._NATIVE_MATH
    attn.processor._attention_backend = Name.NATIVE
    handle.remove()
    assert attn.processor is stock and stock._attention_backend == Name.NATIVE


def test_xformers_on_a_cpu_is_refused_with_the_reason(unet):
    install(unet, Exact())
    for _, processor in unet.attn_processors.items():
        if hasattr(processor, "method"):
            processor._attention_backend = Name.XFORMERS  # what set_attention_backend does where xformers imports
    with pytest.raises(BackendUnavailable, match="'xformers' was chosen, but it needs a CUDA device, got cpu; choose"):
        tiny.denoise(unet)


def test_reasons_against_xformers(monkeypatch):
    assert why_not_xformers(torch.device("cpu")) == "it needs a CUDA device, got cpu"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert why_not_xformers(torch.device("cuda")) == "xformers is not installed"
    require_backend("native", torch.device("cpu"))
    Registry.set_active_backend(Name.XFORMERS)
    with pytest.raises(BackendUnavailable, match="is not installed"):
        require_backend(None, torch.device("cuda"))


PROBE = """
import sys, diffusers
before = set(sys.modules)
import reattend.attn_processors as ours
assert "torch" in before and not any("diffusers.models" in name for name in set(sys.modules) - before), "eager"
from reattend.attn_processors import ATTN_PROCESSORS, install, pluggable
from diffusers.models import attention_dispatch
print(attention_dispatch._AttentionBackendRegistry._active_backend.value)
models = [n for n in sys.modules if n.startswith(("diffusers.models.unets.", "diffusers.models.transformers.",
          "diffusers.models.autoencoders.", "diffusers.pipelines.stable", "gradio", "transformers.models.clip"))]
print(models)
"""


def test_importing_loads_no_model_file_and_the_environment_names_the_backend():
    out = subprocess.run(
        [sys.executable, "-c", PROBE],
        env=os.environ | {"DIFFUSERS_ATTN_BACKEND": "_native_math"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.split("\n")[:2] == ["_native_math", "[]"]
