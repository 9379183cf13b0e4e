"""Parts of training: optimizer, steps, objectives, metrics, run folder."""
