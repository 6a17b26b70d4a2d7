"""Labelled answers by construction: a value, spelled in many ways that mean it and in near ways."""
