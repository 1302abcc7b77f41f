"""Training the embedded models on generated scenes: `python -m mmcompress.evals.micro.training --help`."""
