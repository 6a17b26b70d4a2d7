"""From a micro-batch to its gradients the host never waits for the device.

A device without values stands for it: what needs one raises there. Two layers, one row with a
shared prompt and one without.
"""

from __future__ import annotations

from tests.unit.meta_small import megatron_says


def test_nothing_waits_and_attention_is_one_call_in_a_layer() -> None:
    found = megatron_says("waits")
    assert found["waits"] == []
    calls = {name.removeprefix("aten."): n for name, n in found["calls"].items()}
    assert calls["_flash_attention_forward.default"] == 2 * 2
    assert calls["_flash_attention_backward.default"] == 2 * 2
    # The gradient of keys and of values, where a prompt is shared.
    assert calls["_embedding_bag_forward_only.default"] == 2 * 2
    assert not any(name.startswith("index_put") for name in calls)
