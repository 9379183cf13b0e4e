"""The parts of training: optimizer, steps, objectives, what a run writes."""
