"""What the performance claims stand on; every module prints JSON on its last line."""
