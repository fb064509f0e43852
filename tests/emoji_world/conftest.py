from __future__ import annotations

from pathlib import Path

import pytest
import torch

from reattend.emoji_world import train_vae


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained VAE of the bundled models' kind."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    train_vae.build_vae().save_pretrained(folder)
    return folder
