"""Nearest neighbors from the command line."""

import json

import forks
import numpy as np
import pytest
import torch
from mains import argv_of, call
from PIL import Image
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from test_knn import predictions
from torchvision import transforms as tv

import main_finetune
import main_knn
from mae.inference import features, get_model
from models_vit import vit_mini_patch4


def test_neighbors_of_a_trained_encoder_find_the_classes(classify, capsys):
    untrained = classify(main_knn, k="1 5")
    assert "warning: no `finetune`: the features are from an untrained encoder" in capsys.readouterr().out
    out = classify(main_finetune, "tuned", aa="none", reprob=0, lr=0.003, epochs=20, drop_path=0, cls_token=True)
    found = classify(main_knn, k="1 5", finetune=out / "checkpoint-19.pth")
    assert found.keys() == untrained.keys() == {(1, 0.07), (5, 0.07)}
    assert found[5, 0.07] > 80
    assert found[5, 0.07] >= untrained[5, 0.07]
    expected = [f"* {k}-NN Acc@1 {found[k, 0.07]:.3f}" for k in (1, 5)]
    expected += [json.dumps({f"knn_acc1_k{k}": found[k, 0.07] for k in (1, 5)})]
    assert capsys.readouterr().out.splitlines()[-3:] == expected


def test_accuracies_equal_those_of_scikit_learn(classify, noisy, tmp_path):
    """The features are the class tokens of center crops; the votes are weighted with exp(cosine / temperature)."""
    flags = {"data_path": noisy, "finetune": tmp_path / "encoder.pth"}
    encoder = vit_mini_patch4(img_size=16, num_classes=0, global_pool=False).eval()
    torch.save({"model": encoder.state_dict()}, tmp_path / "encoder.pth")
    found = classify(main_knn, **flags, k="1 5 60", temperature="0.0005 3", crop_pct=0.5, mean="0.1 0.2 0.3",
                     std="0.4 0.5 0.6")  # fmt: skip
    center = tv.Compose([tv.Resize(32, tv.InterpolationMode.BICUBIC), tv.CenterCrop(16), tv.ToTensor(),
                         tv.Normalize([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])])  # fmt: skip
    parts = []
    for split in ("train", "val"):
        files = sorted((noisy / split).glob("*/*"))
        with torch.no_grad():
            tokens = encoder.forward_features(torch.stack([center(Image.open(file)) for file in files]))
        parts.append((tokens, [file.parent.name for file in files]))
    for (k, temperature), accuracy in found.items():
        expected = 100 * accuracy_score(parts[1][1], predictions(*parts, k, temperature))
        assert accuracy == pytest.approx(expected), (k, temperature)
    assert len(set(found.values())) >= 3
    few = classify(main_knn, **flags, k="1 6", train_per_class=2)
    assert few.keys() == {(1, 0.07), (6, 0.07)}
    with pytest.raises(ValueError, match="k=7"):
        classify(main_knn, **flags, k=7, train_per_class=2)
    with pytest.raises(ValueError, match="`nb_classes` is 4"):
        classify(main_knn, **flags, nb_classes=4)


def test_the_default_neighbors_are_at_most_the_training_images(classify, capsys):
    assert classify(main_knn).keys() == {(10, 0.07), (20, 0.07), (48, 0.07)}
    assert "k=[10, 20, 48]" in capsys.readouterr().out


def test_an_encoder_without_a_file_depends_on_the_seed(classify, noisy):
    accuracies = [classify(main_knn, data_path=noisy, k="1 3 5 9", seed=seed) for seed in (5, 5, 6)]
    assert accuracies[0] == accuracies[1] != accuracies[2]


def test_a_sweep_prints_all_accuracies_and_the_best(caplog):
    caplog.set_level("INFO")
    accuracies = {(10, 0.07): 80.0, (10, 0.1): 81.25, (200, 0.07): 79.5, (200, 0.1): 81.0}
    scores = {pair: {"acc1": accuracy} for pair, accuracy in accuracies.items()}
    main_knn.report(scores | {(10, 0.1): {"acc1": 81.25, "balanced_acc": 70.0}}, (10, 0.1))
    table, best, entries = (record.getMessage() for record in caplog.records)
    assert table.splitlines()[1:] == [
        "| k | temperature 0.07 | temperature 0.1 |", "|---|---|---|",
        "| 10 | 80.000 | **81.250 balanced accuracy 70.000** |", "| 200 | 79.500 | 81.000 |",
    ]  # fmt: skip
    assert best.startswith("* 10-NN Acc@1 81.250 balanced accuracy 70.000 with temperature 0.1, the best of 4;")
    scores = json.loads(entries)
    assert (scores["knn_acc1_k200_t0.07"], scores["knn_balanced_acc_k10_t0.1"], len(scores)) == (79.5, 70.0, 5)


def test_imbalanced_classes_have_a_balanced_accuracy(imbalanced, tmp_path):
    """In two processes; exact by scikit-learn, on the features that `mae.inference.features` writes."""
    model, sets = get_model("vit_mini_patch4", input_size=16, nb_classes=0), []
    torch.save({"model": model.state_dict(), "args": model.settings}, tmp_path / "encoder.pth")
    for split in ("train", "val"):
        flags = {"split": split, "model": tmp_path / "encoder.pth", "out": tmp_path / f"{split}.npz", "device": "cpu"}
        call(features, imbalanced, **flags)
        stored = np.load(tmp_path / f"{split}.npz")
        sets.append((torch.tensor(stored["features"]), stored["labels"]))
    predicted = {k: predictions(*sets, k, 1) for k in (5, 20)}
    flags = {"data_path": imbalanced, "finetune": tmp_path / "encoder.pth", "k": "5 20", "temperature": 1,
             "num_workers": 0, "device": "cpu"}  # fmt: skip
    output = forks.run("main_knn.py", argv_of(flags), tmp_path / "output", 2)
    scores = json.loads(output.splitlines()[-1])
    for k, classes in predicted.items():
        accuracy, balanced = (100 * f(sets[1][1], classes) for f in (accuracy_score, balanced_accuracy_score))
        assert (scores[f"knn_acc1_k{k}"], scores[f"knn_balanced_acc_k{k}"]) == pytest.approx((accuracy, balanced))
        assert abs(accuracy - balanced) > 1
        assert f"* {k}-NN Acc@1 {accuracy:.3f} balanced accuracy {balanced:.3f}\n" in output


@pytest.mark.slow
def test_recorded_settings_are_the_defaults(classify, pretrain, labelled, capsys):
    """For a classifier with pooling, and for an autoencoder, whose file records its encoder."""
    shape = {"input_size": 20, "patch_size": 2, "in_chans": 1}
    tuned = classify(main_finetune, "tuned", aa="none", reprob=0, epochs=1, **shape, mean=0.3) / "checkpoint-0.pth"
    mae = pretrain("mae", data_path=labelled, epochs=1, **shape, std=0.4) / "checkpoint-0.pth"
    for file, flags in ((tuned, {**shape, "global_pool": True, "mean": 0.3}), (mae, {**shape, "std": 0.4})):
        given = classify(main_knn, k="1 5", finetune=file, **flags)
        capsys.readouterr()
        assert given == call(main_knn, data_path=labelled, finetune=file, k="1 5", num_workers=0, device="cpu")
        assert "warning" not in capsys.readouterr().out
    classify(main_knn, k=1, finetune=mae, in_chans=1, input_size=32, patch_size=2)
    assert f"warning: input_size=32 is used, and {mae} was made with input_size=20" in capsys.readouterr().out
