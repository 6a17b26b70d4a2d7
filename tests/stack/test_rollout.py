"""Real vLLM engines in real Ray actors, on a tiny model with random weights.

The tests of TestOneEngine share one engine; the last tests start their own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from gpg_megatron.config.sections import RolloutConfig
from gpg_megatron.host.reaper import (
    RUN_ID_VARIABLE,
    cleanup_run,
    new_run_id,
    scratch_directory,
    start_reaper,
)
from gpg_megatron.rollout.failures import EngineDied, EngineError
from gpg_megatron.rollout.fleet import Fleet
from gpg_megatron.rollout.sampling import SamplingRequest
from gpg_megatron.rollout.spec import EngineSpec
from gpg_megatron.types import Completion, Prompt, SamplingParams, VersionSpan
from tests.engine_processes import engine_processes
from tests.samples import int32, plain
from tests.shared_memory import abandoned_segments, all_segments
from tests.tiny import PAD, make_tiny_model

HERE = Path(__file__).resolve().parent
MAX_MODEL_LEN = 256
SCALE = 3.0
PROMPTS = ([10, 20, 30], [40, 50], [60, 70, 80, 90, 100], [7])


@contextmanager
def run_of(model: Path, **changes: Any) -> Iterator[Fleet]:
    """A marked run with its reaper and a fleet; all of it is ended afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        for name in (RUN_ID_VARIABLE, "SPT_NOENV"):  # start_reaper sets them: undone at the end
            patch.setenv(name, "")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), *sys.path]))
        run_id = new_run_id()
        start_reaper(run_id)
        try:
            yield start_fleet(model, run_id, **changes)
        finally:
            cleanup_run(run_id)


def start_fleet(model: Path, run_id: str, *, replaces_lost: bool = False, **changes: int) -> Fleet:
    """changes: keys of the section rollout."""
    settings: dict[str, Any] = {
        "dtype": "fp32",
        "kv_cache_gb": 0.125,
        "enforce_eager": True,
        "startup_timeout_s": 240,
        "generate_timeout_s": 120,
    }
    scratch = scratch_directory(run_id)
    spec = EngineSpec(
        rollout=RolloutConfig(**settings | changes),
        model_path=str(model),
        device="cpu",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=changes.get("max_num_seqs", 64),
        max_num_batched_tokens=8192,
        replaces_lost=replaces_lost,
        worker_extension="worker_ext.Extension",
        weight_transfer="none",
        scratch=scratch,
    )
    fleet = Fleet.start(spec, run_id=run_id, log_dir=scratch)
    fleet.wait_ready()
    return fleet


def request(i: int = 0, **changes: Any) -> SamplingRequest:
    """changes: of the sampling parameters."""
    prompt = Prompt(
        id=f"p/{i}", token_ids=int32(PROMPTS[i]), messages=(), ground_truth="", data_source="p"
    )
    params = SamplingParams(
        n=4, temperature=0.7, top_p=1.0, top_k=-1, max_tokens=24, stop=(), seed=5
    )
    return SamplingRequest(prompt=prompt, params=replace(params, **changes))


def version_of(fleet: Fleet) -> int:
    """With which samples are stamped now."""
    return fleet.generate([request(max_tokens=1)])[0].versions[0].version


def update(fleet: Fleet, version: int, scale: float = 1.0) -> None:
    """An update of the version; and of a weight, which is multiplied."""
    fleet.renew()
    fleet.begin_update()
    fleet.call_workers("scale", [(scale,)] * fleet.num_engines, timeout_s=30)
    fleet.receive(b"").wait(30)
    fleet.commit(version)


def tokens(completions: list[Completion]) -> list[tuple[int, ...]]:
    return [tuple(c.token_ids.tolist()) for c in completions]


def largest_gap(model_dir: Path, prompt: Prompt, c: Completion, temperature: float) -> float:
    """Largest |log-prob difference| between the engine and a plain forward pass."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    ids = torch.tensor([[*prompt.token_ids.tolist(), *c.token_ids.tolist()]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt.token_ids) - 1 : -1] / temperature
    expected = logits.log_softmax(-1).gather(-1, ids[0, len(prompt.token_ids) :, None])[:, 0]
    return float((expected - torch.from_numpy(c.logprobs)).abs().max())


def logprob_gap(model_dir: Path, prompt: Prompt, c: Completion, *, old_until: int) -> list[float]:
    """|log-prob difference| of each token between the engine and a plain model, whose weights are
    the scaled ones from the token at old_until on; keys and values are kept."""
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    ids = torch.tensor([[*prompt.token_ids.tolist(), *c.token_ids.tolist()]])
    # The last token that old weights sampled is read by the new ones.
    border = len(prompt.token_ids) + old_until - 1 if old_until else 0
    logits, past = [], None
    for part, scale in ((ids[:, :border], 1.0), (ids[:, border:-1], SCALE)):
        if not part.shape[1]:
            continue
        with torch.no_grad():
            network.model.layers[0].input_layernorm.weight *= scale
            out = network(part, past_key_values=past, use_cache=True)
        logits.append(out.logits[0])
        past = out.past_key_values
    all_logprobs = torch.cat(logits)[len(prompt.token_ids) - 1 :].log_softmax(-1)
    expected = all_logprobs.gather(-1, ids[0, len(prompt.token_ids) :, None])[:, 0]
    gaps: list[float] = (expected - torch.tensor(c.logprobs)).abs().tolist()
    return gaps


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny_qwen2"))


@pytest.fixture(scope="class")
def fleet(model: Path) -> Iterator[Fleet]:
    with run_of(model) as fleet:
        yield fleet
        fleet.close()
        fleet.close()  # may be called again


class TestOneEngine:
    def test_seeds_decide_the_tokens(self, fleet: Fleet) -> None:
        once, again = fleet.generate([request()]), fleet.generate([request()])
        assert plain(once) == plain(again)
        assert len(set(tokens(once))) == 4  # the samples of a group differ
        assert tokens(fleet.generate([request(seed=6)])) != tokens(once)

    def test_order_is_kept(self, fleet: Fleet) -> None:
        requests = [request(i, n=n) for i, n in ((2, 1), (0, 3), (3, 2), (1, 1))]
        together = fleet.generate(requests)
        names = [(c.prompt_id, c.index) for c in together]
        assert names == [(r.prompt.id, i) for r in requests for i in range(r.params.n)]
        alone = [c for r in requests for c in fleet.generate([r])]
        assert tokens(together) == tokens(alone)

    def test_logprobs_are_of_the_sampling_distribution(self, fleet: Fleet, model: Path) -> None:
        requests = [request(i, temperature=t) for i in (0, 2) for t in (0.7, 1.0)]
        for r in requests:
            for c in fleet.generate([r]):
                assert largest_gap(model, r.prompt, c, r.params.temperature) < 1e-4

    def test_top_k_of_one_leaves_no_choice(self, fleet: Fleet) -> None:
        completions = fleet.generate([request(top_k=1)])
        assert len(set(tokens(completions))) == 1
        assert all(lp == pytest.approx(0.0, abs=1e-6) for lp in completions[0].logprobs)

    def test_finish_reasons(self, fleet: Fleet, model: Path) -> None:
        from transformers import AutoTokenizer

        eos = AutoTokenizer.from_pretrained(model).eos_token_id
        completions = fleet.generate([request(n=32, max_tokens=200, temperature=1.0)])
        assert {c.finish_reason for c in completions} == {"stop", "length"}
        for c in completions:
            assert (c.finish_reason == "stop") == (c.token_ids[-1] == eos)
            assert eos not in c.token_ids[:-1]
            assert (c.finish_reason == "length") <= (len(c.token_ids) == 200)

    def test_a_stop_string_ends_the_response_and_stays_in_it(self, fleet: Fleet) -> None:
        free = fleet.generate([request(n=1, max_tokens=100)])[0]
        stop = next(char for char in free.text[5:] if char.isascii())
        stopped = fleet.generate([request(n=1, max_tokens=100, stop=(stop,))])[0]
        assert stopped.finish_reason == "stop"
        assert stopped.text.endswith(stop) and stop not in stopped.text[:-1]
        assert tokens([stopped])[0] == tokens([free])[0][: len(stopped.token_ids)]
        assert len(stopped.token_ids) == len(stopped.logprobs) < 100

    def test_each_key_of_sampling_at_its_ends(self, fleet: Fleet, model: Path) -> None:
        """What the ranges of the configuration allow is what vLLM does."""
        whole = tokens(fleet.generate([request()]))
        assert tokens(fleet.generate([request(top_k=2**40)])) == whole
        assert len(fleet.generate([request(n=100, max_tokens=1)])) == 100  # above max_num_seqs
        likeliest = tokens(fleet.generate([request(n=1, temperature=0.0)]))
        assert set(tokens(fleet.generate([request(top_p=1e-9)]))) == set(likeliest)
        assert set(tokens(fleet.generate([request(top_k=1)]))) == set(likeliest)
        for temperature in (0.01, 2.0):
            (one,) = fleet.generate([request(n=1, temperature=temperature)])
            assert largest_gap(model, request().prompt, one, temperature) < 1e-3
        for seed in (0, 2**31, 2**63 - 1):
            assert tokens(fleet.generate([request(seed=seed)])) != whole
        assert {c.finish_reason for c in fleet.generate([request(max_tokens=1)])} <= {"length"}

    def test_a_special_token_ends_a_response(self, fleet: Fleet, model: Path) -> None:
        """It is no part of the text, and a token of the response."""
        from transformers import AutoTokenizer

        pad, newline = AutoTokenizer.from_pretrained(model).encode(f"{PAD}\n")
        wanted: dict[str, Any] = {"n": 32, "max_tokens": 200, "temperature": 1.0}
        free = fleet.generate([request(**wanted)])
        assert any(pad in c.token_ids for c in free)
        stopped = fleet.generate([request(**wanted, stop=(PAD, "\n"))])
        for a, b in zip(free, stopped, strict=True):
            ends = [i for i, token in enumerate(a.token_ids) if token in (pad, newline)]
            end = ends[0] + 1 if ends else None
            assert b.token_ids.tolist() == a.token_ids[:end].tolist()
            assert b.finish_reason == ("stop" if ends else a.finish_reason)
            assert b.text.endswith("\n") == (b.token_ids[-1] == newline) and PAD not in b.text

    def test_a_stop_string_spans_tokens_and_the_first_to_be_complete_wins(
        self, fleet: Fleet
    ) -> None:
        one = {"n": 1, "max_tokens": 200}
        (free,) = fleet.generate([request(**one)])
        text = free.text
        at = next(i for i in range(10, len(text) - 3) if text[i : i + 3].isascii())
        early, late = text[at : at + 2], text[at + 1 : at + 3]
        for stop in ((early,), (late, early), (early, early, "\0" * 300)):
            (stopped,) = fleet.generate([request(**one, stop=stop)])
            end = min(text.find(x) + 2 for x in stop if x in text)
            assert stopped.text == text[:end] and stopped.finish_reason == "stop"
            assert tokens([stopped])[0] == tokens([free])[0][: len(stopped.token_ids)]
            assert len(stopped.token_ids) == len(stopped.logprobs) < len(free.token_ids)
        unstopped = fleet.generate([request(**one, stop=("no response says this" * 100,))])
        assert plain(unstopped) == plain([free])

    def test_an_update_stamps_later_samples(self, fleet: Fleet) -> None:
        before = version_of(fleet)
        first = fleet.generate([request()])[0]
        update(fleet, before + 3)
        second = fleet.generate([request()])[0]
        n = len(first.token_ids)
        assert first.versions == (VersionSpan(version=before, start=0, end=n),)
        assert second.versions == (VersionSpan(version=before + 3, start=0, end=n),)
        assert tokens([second]) == tokens([first])

    def test_nothing_is_generated_from_incomplete_weights(self, fleet: Fleet) -> None:
        version = version_of(fleet)
        fleet.begin_update()
        with pytest.raises(EngineError, match="the weights are incomplete"):
            fleet.generate([request()])
        with pytest.raises(EngineError, match=r"failed while receiving weights.*the update failed"):
            fleet.receive(b"fail").wait(30)
        with pytest.raises(EngineError, match="the weights are incomplete"):
            fleet.generate([request()])
        update(fleet, version + 1)  # a whole one mends it
        assert fleet.generate([request()])[0].versions[0].version == version + 1

    def test_nothing_is_generated_by_an_engine_that_sleeps(self, fleet: Fleet) -> None:
        """vLLM's CPU workers keep their memory; the order of the calls is the same."""
        right = fleet.generate([request()])
        version = version_of(fleet)
        fleet.sleep(1)  # as before a save: the weights stay right
        with pytest.raises(EngineError, match="the engine sleeps: kv_cache, weights must wake"):
            fleet.generate([request()])
        fleet.wake(["weights", "kv_cache"])
        assert plain(fleet.generate([request()])) == plain(right)
        fleet.sleep(2)  # as before training: new weights have to come
        fleet.wake(["weights"])
        with pytest.raises(EngineError, match="the engine sleeps: kv_cache must wake"):
            fleet.generate([request()])
        update(fleet, version)
        fleet.sleep(1)  # straight to a save
        fleet.wake(["weights", "kv_cache"])
        assert plain(fleet.generate([request()])) == plain(right)

    def test_weights_that_were_dropped_have_to_be_published(self, fleet: Fleet) -> None:
        version = version_of(fleet)
        fleet.sleep(2)
        fleet.wake(["weights", "kv_cache"])
        with pytest.raises(EngineError, match="they were dropped; they must be published again"):
            fleet.generate([request()])
        update(fleet, version)
        assert len(fleet.generate([request()])) == 4

    def test_a_part_that_is_awake_cannot_wake(self, fleet: Fleet) -> None:
        fleet.sleep(1)
        fleet.wake(["weights"])
        fleet.wake(["kv_cache"])
        fleet.sleep(1)
        fleet.wake(["kv_cache"])
        with pytest.raises(EngineError, match="the engine did not wake kv_cache, weights"):
            fleet.wake(["kv_cache", "weights"])
        fleet.wake(["weights"])
        assert len(fleet.generate([request()])) == 4

    def test_a_failed_update_is_seen_before_it_is_waited_for(self, fleet: Fleet) -> None:
        version = version_of(fleet)
        fleet.begin_update()
        pending = fleet.receive(b"fail")
        deadline = time.monotonic() + 30
        while pending.failure() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert "the update failed" in str(pending.failure())
        update(fleet, version + 1)

    @pytest.mark.parametrize("cache", ["keep", "recompute"])
    def test_running_requests_go_on_after_an_update(
        self, fleet: Fleet, model: Path, cache: Any
    ) -> None:
        """One completion, tokens of two versions, each with the log-prob that its weights gave it
        over the keys and values of both, or of the new ones only."""
        old = version_of(fleet)
        prompt = replace(request().prompt, id="long", token_ids=int32(range(10, 170)))
        long = replace(request(n=4, max_tokens=80, temperature=1.0, seed=11), prompt=prompt)
        fleet.generate([long])
        began = time.monotonic()
        fleet.generate([long])
        taken = time.monotonic() - began
        done: list[Completion] = []
        caller = threading.Thread(target=lambda: done.extend(fleet.generate([long])))
        caller.start()
        time.sleep(taken / 3)
        fleet.begin_update(cache)
        fleet.call_workers("scale", [(SCALE,)], timeout_s=30)
        fleet.receive(b"").wait(30)
        fleet.commit(old + 1)
        caller.join(timeout=120)
        (fresh,) = fleet.generate([replace(long, params=replace(long.params, n=1, seed=12))])
        update(fleet, old + 2, scale=1 / SCALE)
        crossed = [c for c in done if len(c.versions) == 2]
        assert crossed, [c.versions for c in done]
        for c in crossed:
            first, second = c.versions
            assert (first.version, second.version) == (old, old + 1)
            assert 0 == first.start < first.end == second.start < second.end == len(c.token_ids)
            mixed = logprob_gap(model, prompt, c, old_until=first.end)
            new = logprob_gap(model, prompt, c, old_until=0)[first.end :]
            assert max(mixed[: first.end]) < 1e-4
            assert (max(mixed[first.end :]) < 1e-4) is (cache == "keep")
            assert (max(new) < 1e-4) is (cache == "recompute")
        # The prompt's keys and values of the old weights are still there.
        assert max(logprob_gap(model, prompt, fresh, old_until=0)) < 1e-4

    def test_groups_end_in_any_order_and_can_be_stopped(self, fleet: Fleet) -> None:
        long, flights = request(3, max_tokens=240, temperature=1.0, seed=11), fleet.flights()
        whole = fleet.generate([long])
        flights.start(1, long)
        flights.start(2, request(max_tokens=1))
        ((key, answers),) = flights.next()
        assert answers is not None
        assert key == 2 and tokens(answers) == tokens(fleet.generate([request(max_tokens=1)]))
        flights.start(3, request(max_tokens=240, temperature=1.0, seed=12))
        time.sleep(0.1)
        flights.stop(1, keep=True)
        flights.stop(3, keep=False)
        assert len(flights) == 1, "what is not kept never comes"
        while not (landed := flights.next()):
            pass
        ((key, answers),) = landed
        assert answers is not None
        n_tokens = [sum(len(c.token_ids) for c in part) for part in (answers, whole)]
        assert key == 1 and n_tokens[0] < n_tokens[1]
        for a, b in zip(answers, whole, strict=True):
            n = len(a.token_ids)
            assert a.token_ids.tolist() == b.token_ids[:n].tolist() and len(a.logprobs) == n
            assert a.finish_reason == ("length" if n < len(b.token_ids) else b.finish_reason)
        assert len(fleet.generate([request()])) == 4, "the engine goes on"

    def test_calls_reach_the_workers(self, fleet: Fleet) -> None:
        assert fleet.call_workers("hello", [(1, "a")], timeout_s=30) == [[[0, [1, "a"]]]]

    def test_a_failing_call_is_told_and_the_engine_lives_on(self, fleet: Fleet) -> None:
        with pytest.raises(EngineError, match=r"engine 0 failed while calling fail.*too bad"):
            fleet.call_workers("fail", [("too bad",)], timeout_s=30)
        assert len(fleet.generate([request()])) == 4

    def test_a_wait_that_is_too_long_says_for_what(self, fleet: Fleet) -> None:
        with pytest.raises(TimeoutError, match=r"sleep_for.*no answer from engine 0 within 1 s"):
            fleet.call_workers("sleep_for", [(3.0,)], timeout_s=1)
        assert len(fleet.generate([request()])) == 4  # after the sleep

    def test_every_process_carries_the_run(self, fleet: Fleet) -> None:
        mark = f"{RUN_ID_VARIABLE}={os.environ[RUN_ID_VARIABLE]}".encode()
        below = psutil.Process().children(recursive=True)
        # No part of the run: what forks the ranks of other tests, and what has ended and is not yet
        # waited for.
        alive = [p for p in below if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        mine = [p for p in alive if "tests.dist.forker" not in p.cmdline()]
        names = {p.pid: p.name() for p in mine}
        # With one worker the engine's core lives inside the actor.
        assert {"raylet", "gcs_server", "ray::Engine"} <= set(names.values())
        unmarked = {
            name
            for pid, name in names.items()
            if mark not in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        }
        assert not unmarked


def test_requests_are_handed_out_as_engines_have_room(model: Path) -> None:
    """Twice as many samples as both engines run at once; the last prompts are long. One engine
    after the other is killed: what it owes another one answers, and in the end a new one does."""
    with run_of(model, num_engines=2, max_num_seqs=8, replaces_lost=True) as fleet:
        requests = [request(i % 4, seed=i, n=4, max_tokens=8 + 16 * (i % 3)) for i in range(8)]
        together = fleet.generate(requests)
        names = [(c.prompt_id, c.index) for c in together]
        assert names == [(r.prompt.id, i) for r in requests for i in range(r.params.n)]
        alone = [c for r in requests for c in fleet.generate([r])]
        assert tokens(together) == tokens(alone)
        with pytest.raises(EngineError, match="failed while generating a rollout batch"):
            fleet.begin_update()
            fleet.generate(requests)
        update(fleet, 1)
        for actor in actors():
            assert tokens(answers_while(fleet, requests, actor.kill)) == tokens(together)
        fleet.close()


def actors() -> list[psutil.Process]:
    """Of the engines, the oldest first."""
    found = [p for p in engine_processes() if p.name().startswith("ray::Engine")]
    return sorted(found, key=psutil.Process.create_time)


def answers_while(
    fleet: Fleet, requests: list[SamplingRequest], fault: Callable[[], None]
) -> list[Completion]:
    """What is generated when a fault strikes; engines that wait for weights get some meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        task = pool.submit(fleet.generate, requests)
        time.sleep(0.2)
        fault()
        deadline = time.monotonic() + 400
        while not task.done():
            assert time.monotonic() < deadline
            if fleet.waits_for_weights:
                update(fleet, 1)
            time.sleep(0.05)
        return task.result()


@pytest.mark.slow
def test_an_engine_that_hangs_is_ended_and_replaced(
    model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """While it generates, and while nothing is asked of it; and one that is lost too often ends
    the run with what happened last."""
    changes = {"stall_timeout_s": 10, "max_losses_per_hour": 2}
    with run_of(model, replaces_lost=True, **changes) as fleet:
        before = fleet.generate([request(max_tokens=200)])
        for when in ("busy", "idle"):
            (hung,) = actors()
            if when == "busy":
                again = answers_while(fleet, [request(max_tokens=200)], hung.suspend)
            else:
                hung.suspend()
                hung.wait(30)
                again = answers_while(fleet, [request(max_tokens=200)], lambda: None)
            assert tokens(again) == tokens(before) and not hung.is_running()
        printed = capfd.readouterr().err
        assert printed.count("engine 0 has answered nothing for 10 s; it is replaced") == 2
        assert printed.count("engine 0 is there again") == 2
        actors()[0].kill()
        why = r"engine 0 died while .* \(3 engines were lost within an hour, rollout.max_losses"
        with pytest.raises(EngineError, match=why):
            fleet.generate([request(max_tokens=200)])
        fleet.close()


def test_tensor_parallel_engine_and_its_sudden_end(model: Path) -> None:
    """TP = 2 gives the same log-probs; a killed core ends a running call and leaves nothing."""
    segments = all_segments()
    with run_of(model, tensor_model_parallel_size=2) as fleet:
        run_id = os.environ[RUN_ID_VARIABLE]
        assert fleet.call_workers("hello", [()], timeout_s=30) == [[[0, []], [1, []]]]
        for c in fleet.generate([request(2)]):
            assert largest_gap(model, request(2).prompt, c, 0.7) < 1e-4
        processes = engine_processes()
        core = next(p for p in processes if p.name() == "VLLM::EngineCore")
        sockets = [Path(c.laddr) for p in processes for c in p.net_connections("unix")]
        outside = [x for x in sockets if not x.is_relative_to(scratch_directory(run_id))]
        assert sockets and not [x for x in outside if x.is_absolute()], outside
        threading.Timer(1.0, core.kill).start()
        began = time.monotonic()
        with pytest.raises(EngineDied, match="engine 0 died while calling sleep_for"):
            fleet.call_workers("sleep_for", [(60.0,)], timeout_s=60)
        with pytest.raises(EngineDied, match="engine 0 died while generating"):
            fleet.generate([request()])
        assert time.monotonic() - began < 15
        fleet.close()
    assert not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not scratch_directory(run_id).exists()
    assert not abandoned_segments(segments)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["owner", "actor"])
def test_a_kill_leaves_nothing(model: Path, victim: str) -> None:
    """SIGKILL of the owner, or of the actor: the run's processes and segments are gone."""
    segments = all_segments()
    script = (
        "import sys\nfrom pathlib import Path\nfrom gpg_megatron.host import reaper\n"
        "from tests.stack.test_rollout import request, start_fleet\n"
        "reaper.start_reaper(sys.argv[2])\n"
        "fleet = start_fleet(Path(sys.argv[1]), sys.argv[2])\n"
        "print('ready', flush=True)\n"
        "while True: fleet.generate([request(max_tokens=200)])\n"
    )
    run_id = new_run_id()
    owner = subprocess.Popen(
        [sys.executable, "-c", script, str(model), run_id],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == "ready\n"
    processes = psutil.Process(owner.pid).children(recursive=True)
    actor = engine_processes(owner.pid)[0]
    os.kill(owner.pid if victim == "owner" else actor.pid, signal.SIGKILL)
    began = time.monotonic()
    _, errors = owner.communicate(timeout=30)
    if victim == "actor":
        assert "engine 0 died while generating" in errors
    _, left = psutil.wait_procs(processes, timeout=20)
    assert not left
    while scratch_directory(run_id).exists():
        assert time.monotonic() - began < 20
        time.sleep(0.1)
    assert not abandoned_segments(segments)


@pytest.mark.slow
def test_an_engine_that_does_not_start_shows_its_log(tmp_path: Path) -> None:
    broken = make_tiny_model(tmp_path)
    os.truncate(broken / "model.safetensors", 20000)
    with pytest.raises(EngineError, match=r"loading .* into vLLM") as caught, run_of(broken):
        pass
    first, *rest = str(caught.value).splitlines()
    assert first.split("into vLLM: ")[1] and rest[0].startswith("last lines of"), caught.value
