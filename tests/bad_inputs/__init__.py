"""Everything that a person can get wrong, tried: the rows of docs/bad-inputs.md."""
