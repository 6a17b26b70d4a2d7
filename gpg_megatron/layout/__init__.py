"""Which rank holds which rectangle of which Hugging Face tensor."""
