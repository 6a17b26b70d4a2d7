"""Held-out accuracy: in the loop and by gpg-eval."""
