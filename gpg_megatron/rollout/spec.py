"""What the engines of a fleet are started with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpg_megatron.config.sections import RolloutConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """What every engine of a fleet is started with: the section, and what only the caller knows."""

    rollout: RolloutConfig
    model_path: str
    """A Hugging Face directory that every engine's host can read."""
    random_weights: bool = False
    """It has no weights; the first publish brings them."""
    device: Literal["cpu", "cuda"]
    max_model_len: int
    """Longest prompt plus response, in tokens."""
    max_num_seqs: int
    """Sequences that an engine decodes at once."""
    max_num_batched_tokens: int
    """Prompt and decode tokens of one engine step."""
    has_states: bool = False
    """Some layers of the model keep a state of each sequence instead of keys and values."""
    is_latent: bool = False
    """Keys and values are compressed (DeepSeek-V3)."""
    gives_memory_back: bool = False
    """It will be put to sleep; a GPU's workers have to know."""
    replaces_lost: bool = False
    """An engine that is lost is replaced, and gets its weights by the next publish; else the run
    ends."""
    worker_extension: str
    """Dotted path of the class whose methods call_workers reaches."""
    weight_transfer: str | None = None
    """vLLM's name of the weight-transfer engine that the extension's module registers; None: the
    weights stay as they are."""
    scratch: Path
    """Folder for sockets and temporary files of Ray and vLLM; at most 40 characters, since Unix
    sockets lie 62 characters below it. The caller removes it. Another host may have one of its
    own (GPG_SCRATCH)."""

    @property
    def gpus(self) -> int:
        """Of each engine."""
        return self.rollout.tensor_model_parallel_size if self.device == "cuda" else 0
