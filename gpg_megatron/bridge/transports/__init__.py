"""The ways of a bucket from a policy rank to an engine worker."""
