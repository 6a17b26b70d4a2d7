"""What config.yaml and the command line can have wrong."""

from __future__ import annotations

from tests.bad_inputs.case import Case, given

CASES = (
    given("an unknown key", "policy.lrr=1e-6"),
    given("a key without a value", "policy.lr"),
    given("tensor parallelism that does not divide", "policy.tensor_model_parallel_size=3"),
    given("more pipeline stages than layers", "policy.pipeline_model_parallel_size=5"),
    given("virtual stages of no pipeline", "policy.virtual_pipeline_model_parallel_size=2"),
    given("engines that do not divide the heads", "rollout.tensor_model_parallel_size=8"),
    given("sequences longer than the model's", "rollout.max_response_length=5000"),
    given("an unknown scorer", "reward.scorer=gsm9k"),
    given("a number out of range", "rollout.top_p=1.5"),
    given("a number that is a text", "trainer.seed=many"),
    given("a key of an earlier version", "trainer.val_n=4"),
    given("an unknown preset", "algorithm.preset=gpgg"),
    given("a value that is no YAML", "policy.lr=[1"),
    given("an override of no key", "lr=1"),
    given("a name that no configuration has", "--config", "demo"),
    given("a rank of no host", "--nnodes", "2", "--node-rank", "2", "--master-addr", "a"),
    Case(
        name="a configuration nested 100,000 deep",
        brings="`policy: [[[[...`",
        files={"config.yaml": "policy: " + "[" * 100_000},
    ),
    Case(
        name="a configuration that is no text",
        brings="bytes that are not UTF-8",
        files={"config.yaml": b"model: {path: \xff}"},
    ),
    Case(
        name="a configuration that is not there",
        brings="no config.yaml",
        files={"config.yaml": None},
    ),
    Case(
        name="a configuration that is no YAML",
        brings="`policy: {lr: 1e-6`",
        files={"config.yaml": "policy: {lr: 1e-6\n"},
    ),
    Case(
        name="a configuration that is a list",
        brings="`- policy`",
        files={"config.yaml": "- policy\n"},
    ),
)
