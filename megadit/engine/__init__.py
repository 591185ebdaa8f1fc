"""The training engine: DeepSpeed, the optimizer wrapper, clipping, the schedule and averages of weights."""

# Learning-rate schedules by name: functions (step, schedule) -> factor. See megadit/extensions.py.
SCHEDULES = {
    "constant": "megadit.engine.schedule:constant",
    "cosine": "megadit.engine.schedule:cosine",
    "wsd": "megadit.engine.schedule:wsd",
}
