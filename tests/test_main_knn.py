"""Nearest neighbours from the command line."""

import main_finetune
import main_knn


def test_neighbours_of_an_encoder_that_knows_the_classes(classify, capsys):
    untrained = classify(main_knn, k="1 5")
    assert "no --finetune: this is an untrained encoder" in capsys.readouterr().out
    out = classify(main_finetune, "tuned", aa="none", reprob=0, lr=0.003, epochs=20, drop_path=0, cls_token=True)
    found = classify(main_knn, k="1 5", finetune=out / "checkpoint-19.pth")
    assert found.keys() == untrained.keys() == {1, 5}
    assert found[5] > 80
    assert found[5] >= untrained[5]
    assert f"* 5-NN Acc@1 {found[5]:.3f}" in capsys.readouterr().out
