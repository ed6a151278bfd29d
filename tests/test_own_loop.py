"""The example of a training loop of one's own."""

import pytest
from conftest import pretraining
from mains import assert_equal, lines, stop_and_resume, weights

from examples import own_loop


def test_it_trains_as_the_script_and_resumes_within_an_epoch(pictures, tmp_path, monkeypatch):
    whole = pretraining(pictures, tmp_path)("whole")
    run = pretraining(pictures, tmp_path, main=own_loop.main)
    assert_equal(weights(run("own")), weights(whole))
    flags = {"init_from": whole / "checkpoint-1.pth", "preserve": 1, "epochs": 1}
    kept = run("kept", **flags)
    script = pretraining(pictures, tmp_path)("whole_kept", **flags)
    assert_equal(*(weights(out, "checkpoint-0.pth") for out in (kept, script)))
    parts = stop_and_resume(monkeypatch, run, 3)  # an epoch has six updates
    assert_equal(weights(parts), weights(whole))
    assert [line["train_loss"] for line in lines(parts)] == [line["train_loss"] for line in lines(whole)]


def test_it_takes_the_code_of_the_user_and_refuses_what_has_no_effect(pictures, tmp_path):
    flags = {"model_class": "examples.hog_target:HOGTarget", "lr_schedule": "examples.stable_decay:stable_decay",
             "repeated_sampling": 2}  # fmt: skip
    run = pretraining(pictures, tmp_path, main=own_loop.main)
    assert_equal(weights(run("own", **flags)), weights(pretraining(pictures, tmp_path)("whole", **flags)))
    with pytest.raises(ValueError, match="accum_iter"):
        run("updates", accum_iter=3)
