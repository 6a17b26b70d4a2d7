"""One GPG update as a few lines of transformers: padded batches, full logits, every sample."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.policy_batches import sequence
from gpg_megatron.host.device import Device
from gpg_megatron.types import TrainSample


class PlainUpdate:
    """The model with torch's AdamW; every call is one update."""

    def __init__(
        self, path: Path, dtype: torch.dtype, sequences_per_batch: int, device: Device
    ) -> None:
        from transformers import AutoModelForCausalLM

        self.device = device
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device)
        self.model.config.use_cache = False
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, weight_decay=0.0)
        self.sequences_per_batch = sequences_per_batch
        self._first = {name: x.detach().clone() for name, x in self.model.named_parameters()}

    def reset(self) -> None:
        """Back to the first weights."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(self._first[name])

    def __call__(
        self, samples: Sequence[TrainSample], weights: Sequence[float]
    ) -> tuple[float, float]:
        """Loss and gradient norm of the update over samples with these token weights."""
        self.optimizer.zero_grad()
        total = 0.0
        for i in range(0, len(samples), self.sequences_per_batch):
            part = slice(i, i + self.sequences_per_batch)
            loss = self._loss(samples[part], weights[part])
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return total, norm.item()

    def _loss(self, samples: Sequence[TrainSample], weights: Sequence[float]) -> torch.Tensor:
        rows = [torch.from_numpy(sequence(sample)).long() for sample in samples]
        lengths = torch.tensor([len(row) for row in rows])
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        attention_mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).to(self.device)
        tokens = tokens.to(self.device)
        logits = self.model(input_ids=tokens, attention_mask=attention_mask).logits[:, :-1].float()
        logprobs = torch.log_softmax(logits, -1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
        scale = torch.zeros(logprobs.shape)
        for row, sample, weight in zip(scale, samples, weights, strict=True):
            first = len(sample.prompt_token_ids) - 1
            row[first : first + len(sample.response_token_ids)] = sample.advantage * weight
        return -(logprobs * scale.to(self.device)).sum()
