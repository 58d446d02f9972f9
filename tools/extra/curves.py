"""TensorBoard's own reader opens the run's event files, and finds what events.jsonl says.

    python tools/extra/curves.py target/release
"""

import math
import sys

from live import launched
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TAGS = {"epoch/val_loss": ("validated", "val_loss"), "epoch/val_miou": ("validated", "val_miou"), "epoch/train_loss": ("epoch_finished", "train_loss")}

with launched(sys.argv[1]) as run:
    run.wait_for("validated", 3)
    events = run.events()
    curves = EventAccumulator(str(run.place / "runs/demo/tensorboard"))
    curves.Reload()
    for tag, (event, field) in TAGS.items():
        said = [(e["step"], e[field]) for e in events if e["event"] == event]
        read = [(scalar.step, scalar.value) for scalar in curves.Scalars(tag)][: len(said)]
        assert len(said) >= 2 and [step for step, _ in read] == [step for step, _ in said], (tag, read, said)
        assert all(math.isclose(a, b, rel_tol=1e-6) for (_, a), (_, b) in zip(read, said)), (tag, read, said)
    assert "train/loss" in curves.Tags()["scalars"]
print("curves: ok")
