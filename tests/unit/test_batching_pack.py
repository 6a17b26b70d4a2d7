"""Packing, element by element."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from gpg_megatron.batching.updates import pack
from gpg_megatron.types import Routing
from tests.samples import float32, routing
from tests.samples import train_sample as sample


def test_pack_by_hand() -> None:
    a = sample(prompt=(10, 11, 12), response=(20, 21), advantage=0.5)
    b = sample(prompt=(30,), response=(40,), advantage=-1.0)
    mb = pack([a, b], [0.25, 0.125])
    assert mb.input_ids_T.tolist() == [10, 11, 12, 20, 21, 30, 40]
    assert mb.position_ids_T.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert mb.labels_T.tolist() == [11, 12, 20, 21, 0, 40, 0]
    assert mb.cu_seqlens_S1.tolist() == [0, 5, 7]
    assert mb.prompt_S.tolist() == [-1, -1]
    assert mb.loss_mask_T.tolist() == [False, False, True, True, False, True, False]
    assert mb.advantages_T.tolist() == [0, 0, 0.5, 0.5, 0, -1.0, 0]
    assert mb.weights_T.tolist() == [0, 0, 0.25, 0.25, 0, 0.125, 0]
    assert mb.rollout_logprobs_T.tolist() == [0, 0, -2.5, -2.625, 0, -5.0, 0]


def test_pack_with_a_shared_prompt_by_hand() -> None:
    prompt = (10, 11, 12)
    a = sample(prompt=prompt, response=(20, 21), advantage=0.5)
    b = sample(prompt=prompt, response=(30,), advantage=-1.0)
    other = sample(prompt=(13,), response=(40,))
    mb = pack([a, b, other], [0.25, 0.5, 1.0], share_prompts=True)
    # the prompt but for its last token | that token and 20 | that token | another sequence
    assert mb.input_ids_T.tolist() == [10, 11, 12, 20, 12, 13, 40]
    assert mb.position_ids_T.tolist() == [0, 1, 2, 3, 2, 0, 1]
    assert mb.labels_T.tolist() == [11, 12, 20, 21, 30, 40, 0]
    assert mb.cu_seqlens_S1.tolist() == [0, 2, 4, 5, 7]
    assert mb.prompt_S.tolist() == [-1, 0, 0, -1]
    assert mb.loss_mask_T.tolist() == [False, False, True, True, True, True, False]
    assert mb.advantages_T.tolist() == [0, 0, 0.5, 0.5, -1.0, 1.0, 0]
    assert mb.weights_T.tolist() == [0, 0, 0.25, 0.25, 0.5, 1.0, 0]
    assert mb.rollout_logprobs_T.tolist() == [0, 0, -2.5, -2.625, -3.75, -5.0, 0]
    assert pack([a, b], [0.25, 0.5]).prompt_S.tolist() == [-1, -1]


def test_pack_lays_the_experts_beside_their_tokens() -> None:
    """What a token of the table is sent to begins with the number in the last column."""
    prompt = (10, 11, 12)
    a = sample(prompt=prompt, response=(20, 21), routing=routing((50, 60), (70, 80)))
    b = sample(prompt=prompt, response=(30,), routing=routing((51, 61), (90,)))
    cut = sample(prompt=(13, 14), response=(40, 41), routing=routing((100,), (110,)))
    alone = pack([a, cut], [1.0, 1.0])
    assert alone.input_ids_T.tolist() == [10, 11, 12, 20, 21, 13, 14, 40, 41]
    assert _first(alone.experts_T) == [50, 60, 70, 80, -1, 100, 110, -1, -1]
    shared = pack([a, b, sample(prompt=(15,)), cut], [1.0] * 4, share_prompts=True)
    assert shared.input_ids_T.tolist() == [10, 11, 12, 20, 12, 15, 3, 4, 13, 14, 40, 41]
    assert _first(shared.experts_T) == [50, 60, 70, 80, 90, -1, -1, -1, 100, 110, -1, -1]


def test_a_prompt_of_one_token_has_none_but_the_last() -> None:
    one = sample(prompt=(9,), response=(3, 4), routing=routing((), (5, 7)))
    both = pack([one, one], [1.0, 1.0], share_prompts=True)
    assert both.input_ids_T.tolist() == [9, 3, 4, 9, 3, 4]
    assert _first(both.experts_T) == [5, 7, -1, 5, 7, -1]


def test_numbers_above_255_stay() -> None:
    many = Routing(
        prompt=np.full((1, 1, 1), 300, np.uint16), response=np.full((2, 1, 1), 511, np.uint16)
    )
    packed = pack([sample(routing=many)], [1.0])
    assert packed.experts_T.flatten().tolist() == [300, 511, 511, -1]


def _first(experts_T: torch.Tensor) -> list[int]:
    """The first of each token; the others follow from it."""
    assert experts_T.shape[1:] == (2, 2)
    first_T = experts_T[:, :1, :1]
    places = torch.tensor([[0, 1], [2, 3]]) * (first_T >= 0)
    assert torch.equal(experts_T, (first_T + places).to(torch.int16))
    numbers: list[int] = first_T.flatten().tolist()
    return numbers


def test_pack_types() -> None:
    mb = pack([sample()], [1.0])
    dtypes = {f.name: getattr(mb, f.name).dtype for f in dataclasses.fields(mb)}
    assert dtypes == {
        "input_ids_T": torch.int64,
        "position_ids_T": torch.int64,
        "labels_T": torch.int64,
        "cu_seqlens_S1": torch.int32,
        "responses_T": torch.int64,
        "prompt_S": torch.int32,
        "loss_mask_T": torch.bool,
        "advantages_T": torch.float32,
        "weights_T": torch.float32,
        "rollout_logprobs_T": torch.float32,
        "experts_T": torch.int16,
    }
    assert mb.experts_T.shape == (4, 0, 0)


def test_pack_of_an_empty_response_has_no_loss() -> None:
    mb = pack([sample(prompt=(1, 2, 3), response=())], [0.0])
    assert mb.labels_T.tolist() == [2, 3, 0]
    assert not mb.loss_mask_T.any()


def test_pack_refuses_what_it_cannot_predict() -> None:
    with pytest.raises(AssertionError, match="no token to predict from"):
        pack([sample(prompt=())], [1.0])
    with pytest.raises(AssertionError, match="toy/0"):
        pack([dataclasses.replace(sample(), rollout_logprobs=float32((-1.0,)))], [1.0])
