"""Learned compressors whose token count is a dial, without any engine."""
