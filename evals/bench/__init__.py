"""What methods cost, measured against the plainest way to the same answer."""
