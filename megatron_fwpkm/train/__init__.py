"""Engine, loop, schedule, metrics and checkpoints of a training job."""
