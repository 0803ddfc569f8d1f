"""Checkpoints that come with the package, each in a folder laid out as it would be on the Hugging Face Hub."""
