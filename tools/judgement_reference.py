#!/usr/bin/env python3
"""Writes how others judge: Keras' EarlyStopping on scripted curves, scikit-learn's metrics on random predictions.

    python3 tools/judgement_reference.py

Writes coordinator/tests/reference/early_stopping.json and worker/model/tests/reference/scores.json. Needs keras (on
torch), scikit-learn and numpy.
"""
import json
import os
import pathlib

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
from sklearn import metrics

ROOT = pathlib.Path(__file__).parents[1]
MONITORS = {"val_loss": "min", "val_accuracy": "max", "val_miou": "max"}


class Model:
    """What the callback asks of a model; its weights are the number of the epoch that they are of, from 1."""

    stop_training = False
    epoch = 0

    def get_weights(self):
        return self.epoch

    def set_weights(self, epoch):
        self.epoch = epoch


def judged(rules, curve):
    """(epoch after which it stopped or none, best epoch or none, epoch whose weights the model ends with)"""
    model = Model()
    callback = keras.callbacks.EarlyStopping(**rules, mode=MONITORS[rules["monitor"]], restore_best_weights=True)
    callback.set_model(model)
    callback.on_train_begin()
    stopped = None
    for epoch, value in enumerate(curve):
        model.epoch = epoch + 1
        callback.on_epoch_end(epoch, {rules["monitor"]: value})
        if model.stop_training:
            stopped = epoch + 1
            break
    callback.on_train_end()
    best = None if callback.best is None or callback.best_weights is None else callback.best_epoch + 1
    return stopped, best, model.epoch


def early_stopping():
    generator = np.random.default_rng(3)
    cases = []
    for _ in range(300):
        rules = {
            "monitor": str(generator.choice(list(MONITORS))),
            "patience": int(generator.integers(1, 6)),
            # Not a difference of two values: Keras compares in float32, and would round a tie away.
            "min_delta": float(generator.choice([0.0, 0.013, 0.11])),
            "start_from_epoch": int(generator.choice([0, 0, 1, 3])),
        }
        # Few values, so that some are equal; a trend, so that some curves run long.
        steps = generator.integers(-3, 4, 14) / 20
        trend = (-1 if MONITORS[rules["monitor"]] == "min" else 1) * generator.choice([0.0, 0.05, 0.1])
        curve = [round(float(x), 3) for x in 1 + np.cumsum(steps * 0.5 + trend)]
        stopped, best, final = judged(rules, curve)
        cases.append({"rules": rules, "curve": curve, "stopped": stopped, "best": best, "final": final})
    return cases


def scores():
    generator = np.random.default_rng(4)
    cases = []
    for classes, present in ((3, 3), (3, 2), (5, 4)):
        shape = (2, classes, 6, 7)
        logits = np.round(generator.normal(0, 2, shape), 3).astype(np.float32)
        logits[:, present:] -= 100  # never predicted
        masks = generator.integers(0, present, (shape[0], *shape[2:]))
        truth, predicted = masks.ravel(), logits.argmax(1).ravel()
        likely = np.exp(logits.astype(np.float64)).transpose(0, 2, 3, 1).reshape(-1, classes)
        likely /= likely.sum(1, keepdims=True)
        occurring = list(range(present))
        cases.append({
            "shape": shape,
            "logits": [float(f"{x:.3f}") for x in logits.ravel()],
            "masks": truth.tolist(),
            "confusion": metrics.confusion_matrix(truth, predicted, labels=range(classes)).ravel().tolist(),
            "loss": float(-np.log(likely[np.arange(len(truth)), truth]).mean()),
            "accuracy": metrics.accuracy_score(truth, predicted),
            "miou": metrics.jaccard_score(truth, predicted, labels=occurring, average="macro"),
            "iou": metrics.jaccard_score(truth, predicted, labels=occurring, average=None).tolist(),
            "dice": metrics.f1_score(truth, predicted, labels=occurring, average=None).tolist(),
        })
        assert abs(cases[-1]["loss"] - metrics.log_loss(truth, likely, labels=range(classes))) < 1e-9
    return cases


def write(path, cases):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(map(json.dumps, cases)) + "\n]\n")


write(ROOT / "coordinator/tests/reference/early_stopping.json", early_stopping())
write(ROOT / "worker/model/tests/reference/scores.json", scores())
