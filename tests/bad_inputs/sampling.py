"""What cannot be sampled as it is asked for."""

from __future__ import annotations

from tests.bad_inputs.case import given

CASES = (
    given("an empty stop string", 'rollout.stop=["\\n", ""]'),
    given("a special token within a stop string", 'rollout.stop=["<|im_end|>\\n"]'),
    given("half a character as a stop string", 'rollout.stop=["\\ud800"]'),
    given("a temperature of nothing", "rollout.temperature=0"),
    given("a temperature that vLLM would raise", "rollout.temperature=1e-3"),
    given("a temperature that vLLM refuses", "rollout.temperature=3"),
    given("a temperature below nothing", "validation.temperature=-1"),
    given("a temperature that is no number", "rollout.temperature=.nan"),
    given("no sample", "rollout.n=0"),
    given("a million samples", "rollout.n=1000000"),
    given("a probability of nothing", "rollout.top_p=0"),
    given("no token to choose from", "rollout.top_k=0"),
    given("a response of no token", "rollout.max_response_length=-5"),
    given("a seed that no generator takes", "trainer.seed=18446744073709551616"),
    given("a seed below zero", "trainer.seed=-1"),
)
