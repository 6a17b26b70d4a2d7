"""gpg_megatron: reinforcement learning of reasoning models with Group Policy Gradient."""

__version__ = "0.1.0"
