"""--qk_norm: the norm of queries and keys, from pre-training to fine-tuning, predictions and exports."""

import pytest
import torch
from torch.nn import functional as F

import main_finetune
from mae.inference import export, get_model
from mae.weights import loading
from models_vit import Attention


def test_queries_and_keys_of_each_head_are_normalized():
    torch.manual_seed(0)
    layer, x = Attention(8, 2, qk_norm="rms"), torch.randn(3, 5, 8)
    torch.nn.init.uniform_(layer.q_norm.weight)
    q, k, v = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in layer.qkv(x).chunk(3, dim=2))
    q, k = (part / (part.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
    expected = F.scaled_dot_product_attention(q * layer.q_norm.weight, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x), layer.proj(expected))
    torch.testing.assert_close(Attention(8, 2, qk_norm="layer").q_norm(x[..., :4]),
                               F.layer_norm(x[..., :4], (4,), eps=1e-6))  # fmt: skip


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_file_records_the_norm(norm, pretrain, classify, tmp_path):
    file = pretrain(qk_norm=norm, epochs=1) / "checkpoint-0.pth"
    assert "decoder_blocks.0.attn.k_norm.weight" in loading.read(file).tensors
    tuned = get_model(classify(main_finetune, "tuned", finetune=file, epochs=1) / "checkpoint-0.pth")
    assert tuned.settings["qk_norm"] == norm
    images = torch.randn(2, 3, 16, 16)
    export.export(tuned, "safetensors", tmp_path / "m.safetensors")
    torch.testing.assert_close(get_model(tmp_path / "m.safetensors")(images), tuned(images))
    for to, name in (("timm", "t"), ("transformers", "t")):
        with pytest.raises(ValueError, match=f"to={to}"):
            export.export(tuned, to, tmp_path / name)
