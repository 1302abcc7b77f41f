"""Adapters between the core and the engines people run."""
