"""The commands that the service adds to `tuner`, one file a subject."""
