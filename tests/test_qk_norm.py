"""--qk_norm: the norm of queries and keys, from pre-training to fine-tuning, predictions and exports."""

import pytest
import torch
from torch.nn import functional as F

import main_finetune
import main_pretrain
from inference import export, get_model
from models_vit import Attention
from util.cli import entry_point
from util.weights import loading

SMALL = ["--input_size", "16", "--epochs", "1", "--warmup_epochs", "0", "--batch_size", "4", "--device", "cpu",
         "--num_workers", "0"]  # fmt: skip


def run(script, *flags):
    script.main(entry_point.parse(script.get_args_parser(), [*SMALL, *map(str, flags)]))


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
def test_a_file_records_the_norm(norm, pictures, labelled, tmp_path):
    out = tmp_path / "mae"
    run(main_pretrain, "--model", "mae_vit_mini_patch4", "--qk_norm", norm, "--data_path", pictures, "--output_dir",
        out)  # fmt: skip
    file = out / "checkpoint-0.pth"
    assert "decoder_blocks.0.attn.k_norm.weight" in loading.read(file).tensors
    run(main_finetune, "--finetune", file, "--data_path", labelled, "--output_dir", tmp_path / "tuned")
    tuned = get_model(tmp_path / "tuned" / "checkpoint-0.pth")
    assert tuned.settings["qk_norm"] == norm
    images = torch.randn(2, 3, 16, 16)
    export.export(tuned, "safetensors", tmp_path / "m.safetensors")
    torch.testing.assert_close(get_model(tmp_path / "m.safetensors")(images), tuned(images))
    for to, name in (("timm", "t"), ("transformers", "t"), ("mmpretrain", "t.pth")):
        with pytest.raises(ValueError, match=rf"--to {to}: .*--qk_norm"):
            export.export(tuned, to, tmp_path / name)
