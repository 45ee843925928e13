"""The bench: statistics, shapes, correctness gate, report. Times themselves are not tested."""

import json

import fastmoe_route as fr
import pytest
import torch
from fastmoe_route.bench import baselines, check, expert_cases, runner, shapes, timing, workload
from fastmoe_route.bench.case import compare
from fastmoe_route.bench.machine import Limits, cache_bytes, describe
from fastmoe_route.bench.report import Reporter, duration, row_line
from scripts import script
from tolerance import assert_bound

TINY = shapes.parse_shape("64,32,8,2")


def tiny_limits() -> Limits:
    """Limits with made-up rates and no rotation to speak of."""
    return Limits(
        quick=True,
        peak={"float32": 1e11, "bfloat16": 2e11},
        read=1e10,
        copy=9e9,
        level1=4e11,
        level2=2e11,
        torch_mm={"float32": 5e10},
    )


def rows_of(*ops: str, passes: str = "both", dtype: str = "float32") -> list[shapes.Row]:
    return shapes.select_rows(ops, [TINY], [12], [dtype], passes)


def run_tiny(row: shapes.Row) -> runner.Result:
    weights = workload.make_weights(TINY, getattr(torch, row.dtype), 0, 1 << 20, 1 << 16)
    return runner.run_row(row, tiny_limits(), weights, seconds=0.0, min_rounds=2, seed=0)


class TestStatistics:
    def test_quantiles_by_hand(self):
        summary = timing.summarize([5.0, 1.0, 2.0, 4.0, 3.0])
        assert summary == timing.Summary(median=3.0, p10=1.4, p90=4.6, samples=5)

    def test_nothing_to_sum_up(self):
        with pytest.raises(ValueError, match="summarize: values must not be empty"):
            timing.summarize([])

    def test_ratio_is_taken_turn_by_turn(self):
        # A machine that slows down threefold half-way: medians of times would mislead, ratios not.
        state = {"now": 0.0, "calls": 0}

        def call(cost):
            def work(_index):
                state["calls"] += 1
                slow = 3.0 if state["calls"] > 20 else 1.0
                state["now"] += cost * slow

            return work

        result = timing.interleave(
            {"ours": call(1.0), "theirs": call(2.0)},
            0.0,
            min_rounds=16,
            sample_seconds=0.5,
            clock=lambda: state["now"],
        )
        assert result.ratios["theirs"].median == pytest.approx(2.0)
        assert result.best == "theirs"
        assert result.seconds["ours"].samples == 16

    def test_calls_are_numbered_without_repeats(self):
        seen = []
        timing.interleave({"a": seen.append, "b": seen.append}, 0.0, min_rounds=3)
        assert seen == list(range(len(seen)))

    def test_durations(self):
        assert [duration(s) for s in (2.5, 0.0123, 4.56e-5, 1e-8)] == [
            "2.50 s", "12.3 ms", "45.6 us", "0.01 us",
        ]  # fmt: skip


class TestShapes:
    def test_named_and_numbers(self):
        assert shapes.parse_shape("dsv3").gate == "dsv3"
        assert (TINY.hidden, TINY.intermediate, TINY.num_experts, TINY.top_k) == (64, 32, 8, 2)
        assert TINY.expert_elements == 3 * 64 * 32

    @pytest.mark.parametrize(
        "text", ["qwen", "1,2,3", "64,32,2,4", "0,1,1,1", "a,b,c,d", "-1,2,3,4"]
    )
    def test_bad_shape(self, text):
        with pytest.raises(ValueError, match=r"shape .* got"):
            shapes.parse_shape(text)

    def test_tokens(self):
        assert shapes.parse_tokens("1,16") == [1, 16]
        with pytest.raises(ValueError, match=r"tokens must be positive .* got '1,0'"):
            shapes.parse_tokens("1,0")

    def test_rows_are_grouped_by_shape_and_dtype(self):
        rows = shapes.select_rows([], [], [16], [], "forward")
        keys = [(r.shape.name, r.dtype) for r in rows if r.op in shapes.WEIGHT_OPS]
        changes = [key for i, key in enumerate(keys) if i == 0 or key != keys[i - 1]]
        assert len(changes) == len(set(changes))
        assert all(shapes.applies(row.op, row.shape) for row in rows)

    def test_quick_rows_cover_every_op(self):
        assert {row.op for row in shapes.quick_rows([], [], [], [])} == set(shapes.OPS)
        assert {row.op for row in shapes.quick_rows(["gate"], [], [], [])} == {"gate"}


class TestCheck:
    expected = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def test_right_values_pass(self):
        assert check.bound("x", self.expected.float(), self.expected, 1e-6).passed

    @pytest.mark.parametrize("spoil", ["zeros", "swapped rows", "one nan", "one element"])
    def test_spoilt_values_fail(self, spoil):
        got = self.expected.float()
        if spoil == "zeros":
            got = torch.zeros_like(got)
        elif spoil == "swapped rows":
            got = got[[1, 0, 2, 3, 4, 5]]
        elif spoil == "one nan":
            got[2, 3] = torch.nan
        else:
            got[2, 3] += 0.01
        finding = check.bound("x", got, self.expected, 1e-4)
        assert not finding.passed
        assert str(finding).startswith("WRONG: x: error")

    def test_garbage_where_zero_is_expected(self):
        zeros = torch.zeros(2, 3)
        assert check.bound("x", zeros, zeros, 1e-4).passed
        assert not check.bound("x", zeros + 1e-30, zeros, 1e-4).passed

    def test_no_worse(self):
        plain = self.expected.float()
        assert check.no_worse("x", plain.clone(), plain, self.expected).passed
        assert not check.no_worse("x", plain * (1 + 1e-5), plain, self.expected).passed

    @pytest.mark.parametrize(("num_elements", "passes"), [(1, True), (15, True), (16, False)])
    def test_rms_of_a_few_elements_decides_nothing(self, num_elements, passes):
        wanted = torch.ones(1, num_elements, dtype=torch.float64)
        got = wanted.float() * (1 + 1e-6)  # plain PyTorch happened to be exact
        findings = compare("x", got, wanted.float(), wanted, 1e-4)
        assert all(f.passed for f in findings) == passes
        assert not compare("x", got * 1.001, wanted.float(), wanted, 1e-4)[0].passed

    def test_exact(self):
        ids = torch.tensor([1, 2], dtype=torch.int32)
        assert check.exact("x", ids, ids.clone()).passed
        assert not check.exact("x", ids, ids.flip(0)).passed
        assert not check.exact("x", ids, ids.long()).passed


class TestWorkload:
    def test_experts_differ(self):
        weights = workload.make_weights(TINY, torch.float32, 0, 0, 1 << 20)
        assert weights.copies > 1
        assert not torch.equal(weights.ups[0][0], weights.ups[0][1])
        assert torch.equal(weights.ups[0], weights.ups[1])

    def test_memory_is_asked_for_first(self):
        huge = shapes.Shape("huge", 1 << 20, 1 << 20, 64, 2)
        with pytest.raises(workload.OutOfMemory, match="the weights of huge in float32 needs"):
            workload.make_weights(huge, torch.float32, 0, 0, 1 << 20)

    def test_baselines_agree(self):
        tokens = workload.make_tokens(TINY, 9, torch.float32, 0)
        weights = workload.make_weights(TINY, torch.float32, 0, 1 << 20, 1 << 20)
        arguments = (tokens.x, tokens.experts, tokens.weights, weights.ups[0], weights.downs[0])
        loop, grouped = baselines.experts_loop(*arguments), baselines.experts_grouped(*arguments)
        assert_bound(loop, grouped, 1e-5)


class TestRows:
    @pytest.mark.parametrize("row", rows_of(*shapes.OPS), ids=str)
    def test_every_op_is_right_and_timed(self, row):
        result = run_tiny(row)
        assert result.findings
        assert result.passed, [str(f) for f in result.findings if not f.passed]
        assert result.timing is not None
        assert result.floor_seconds > 0
        assert result.num_bytes > 0

    def test_rows_that_move_are_counted_by_pass(self):
        """Declared bytes, as rows: what each pass reads and writes."""
        row_bytes, num_tokens = TINY.hidden * 4, rows_of("permute")[0].tokens
        num_rows = num_tokens * TINY.top_k
        wanted = {
            ("permute", False): num_tokens + num_rows,
            ("permute", True): (num_tokens + num_rows) + (num_rows + num_tokens),
            ("unpermute", False): num_rows + num_tokens,
            ("unpermute", True): (num_rows + num_tokens) + (num_tokens + num_rows) + num_rows,
        }
        for row in rows_of("permute", "unpermute"):
            assert run_tiny(row).num_bytes == wanted.pop((row.op, row.training)) * row_bytes
        assert not wanted

    @pytest.mark.parametrize("row", rows_of("gate", "moe_mlp", "layer", dtype="bfloat16"), ids=str)
    def test_bfloat16(self, row):
        assert run_tiny(row).passed

    @pytest.mark.parametrize("row", rows_of("grouped_mm", "moe_mlp"), ids=str)
    def test_products_are_held_against_multiply_adds_beside(self, row, monkeypatch):
        assert run_tiny(row).multiply == 0.0  # too few of them
        monkeypatch.setattr(expert_cases, "_LEAST_FLOPS", 0.0)
        result = run_tiny(row)
        assert result.yardsticks["multiply-adds"].median > 0
        assert result.bound_by != "arithmetic" or result.floor_seconds == pytest.approx(
            result.flops / result.multiply
        )
        assert result.as_dict()["limit"]["multiply_flops"] == result.multiply

    @pytest.mark.parametrize("row", rows_of("grouped_mm", "moe_mlp"), ids=str)
    def test_weights_in_memory_are_held_against_what_is_read_beside(self, row):
        weights = workload.make_weights(TINY, torch.float32, 0, 0, 1 << 20)
        result = runner.run_row(row, tiny_limits(), weights, seconds=0.0, min_rounds=2, seed=0)
        assert result.read > 0
        assert result.yardsticks["read of weights"].median > 0
        assert result.bound_by != "memory" or result.floor_seconds == result.num_bytes / result.read
        assert result.as_dict()["limit"]["read_bytes_per_second"] == result.read
        # Weights that stay in the caches are not.
        assert run_tiny(row).as_dict()["limit"]["read_bytes_per_second"] is None

    def test_wrong_values_are_caught(self, monkeypatch):
        right = fr.moe_mlp
        monkeypatch.setattr(fr, "moe_mlp", lambda *a, **k: right(*a, **k) * 1.01)
        for row in rows_of("moe_mlp", "layer"):
            result = run_tiny(row)
            assert not result.passed
            assert result.timing is None
            assert "WRONG RESULT" in row_line(result)

    def test_wrong_gradients_are_caught(self, monkeypatch):
        right = fr.gate

        def half_gradient(logits, *arguments, **options):
            routing = right(logits, *arguments, **options)
            w = routing.weights
            return routing._replace(weights=w * 0.5 + (w * 0.5).detach())

        monkeypatch.setattr(fr, "gate", half_gradient)
        forward, training = rows_of("gate")
        assert run_tiny(forward).passed
        assert not run_tiny(training).passed

    def test_wrong_ids_are_caught(self, monkeypatch):
        right = fr.gate
        monkeypatch.setattr(
            fr,
            "gate",
            lambda *a, **k: (r := right(*a, **k))._replace(experts=r.experts.flip(1)),
        )
        assert not run_tiny(rows_of("gate")[0]).passed

    def test_row_that_does_not_fit_is_skipped(self, monkeypatch):
        monkeypatch.setattr(workload, "available_bytes", lambda: 0)
        result = runner.run_row(
            rows_of("permute")[0], tiny_limits(), None, seconds=0.0, min_rounds=1, seed=0
        )
        assert "0.0 GB are free" in result.skipped
        assert result.passed
        assert "skipped" in row_line(result)


class TestPeers:
    row = rows_of("moe_mlp", passes="forward")[0]

    def run_beside(self, peer) -> runner.Result:
        weights = workload.make_weights(TINY, torch.float32, 0, 1 << 20, 1 << 16)
        weights.peers["other"] = [lambda x, ids, w: peer(x, ids, w, weights)] * weights.copies
        return runner.run_row(self.row, tiny_limits(), weights, seconds=0.0, min_rounds=2, seed=0)

    def test_same_work_is_timed(self):
        def other(x, ids, w, weights):
            return baselines.experts_loop(x, ids, w, weights.ups[0], weights.downs[0])

        result = self.run_beside(other)
        assert result.notes == []
        assert result.timing is not None
        assert "other" in result.timing.ratios

    @pytest.mark.parametrize("fault", ["raises", "wrong", "nan"])
    def test_faulty_peer_is_left_out_and_named(self, fault, capsys):
        def other(x, ids, w, weights):
            if fault == "raises":
                raise RuntimeError("no such instruction")
            return x * (torch.nan if fault == "nan" else 2.0)

        result = self.run_beside(other)
        assert result.passed
        assert result.timing is not None
        assert "other" not in result.timing.ratios
        Reporter(1).finish(result)
        assert "other is left out: " in capsys.readouterr().out

    def test_lost_rows_are_named(self, capsys):
        def summary(value: float) -> timing.Summary:
            return timing.Summary(value, value, value, 5)

        result = runner.Result(self.row)
        result.timing = timing.Timing(
            seconds={"fastmoe_route": summary(1.0), "other": summary(0.8), "loop": summary(3.0)},
            ratios={"other": summary(0.8), "loop": summary(3.0)},
            calls_per_sample={},
        )
        Reporter(1).tail([result], 1.0, None, None)
        out = capsys.readouterr().out
        assert "1 slower than the fastest beside" in out
        assert f"behind: {self.row}: other takes 0.80 of our time\n" in out

    def test_none_installed_says_what_to_do(self, monkeypatch, capsys):
        monkeypatch.setattr(runner.peers, "installed", lambda: [])
        assert runner.run(runner.Options(peers=True)) == 2
        assert "make bench-peers" in capsys.readouterr().err


class TestLimits:
    def test_peaks_and_bandwidth_are_plausible(self):
        for code in (0, 1):
            torch.ops.fastmoe_route.machine_peak(code, 1.0)  # a step of each thread
        limits = Limits()
        limits.probe_peaks(0.01)
        assert all(1e8 < limits.peak[name] < 1e15 for name in ("float32", "bfloat16"))
        ones = torch.ones(1000)
        assert torch.ops.fastmoe_route.machine_read(ones, 1) == 1000.0
        assert torch.ops.fastmoe_route.machine_read(ones[:3], 1) == 3.0
        # Every element once, wherever streams end.
        counted = torch.arange(5003, dtype=torch.float32)
        assert torch.ops.fastmoe_route.machine_read(counted, 1) == 5003 * 5002 / 2
        assert torch.ops.fastmoe_route.machine_read(counted[:2048], 3) == 3 * 2048 * 2047 / 2
        assert torch.ops.fastmoe_route.machine_read(torch.empty(0), 1) == 0.0

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda ops: ops.machine_peak(7, 1e6), r"dtype_code must be 0 .* got 7"),
            (lambda ops: ops.machine_peak(0, -1.0), r"flops must be in \(0, 1e15\], got -1"),
            (lambda ops: ops.machine_read(torch.ones(4).double(), 1), "buffer must be float32"),
            (lambda ops: ops.machine_read(torch.ones(4, 4).t(), 1), "buffer must be contiguous"),
            (lambda ops: ops.machine_read(torch.ones(4), 0), "passes must be at least 1, got 0"),
        ],
    )
    def test_bad_arguments(self, call, message):
        with pytest.raises(RuntimeError, match=message):
            call(torch.ops.fastmoe_route)

    def test_a_peak_that_torch_beats_is_measured_again(self):
        limits = Limits(quick=True, peak={"float32": 1.0, "bfloat16": 1e18})
        limits.probe_torch()
        assert limits.peak["float32"] > 1e8
        assert limits.peak["bfloat16"] == 1e18

    def test_what_binds(self):
        limits = tiny_limits()
        assert limits.floor(10**10, 1.0, "float32", cached=False) == (1.0, "memory")
        assert limits.floor(8, 1e11, "float32", cached=False) == (1.0, "arithmetic")
        assert limits.floor(10**10, 1.0, "float32", cached=False, read=2e10) == (0.5, "memory")
        assert limits.floor(8, 1e11, "float32", cached=False, multiply=5e10) == (2.0, "arithmetic")
        assert limits.floor(8, 0.0, "bfloat16", cached=True)[1] == "level 1"
        assert limits.floor(cache_bytes(2) // 2, 0.0, "float32", cached=True)[1] == "level 2"

    def test_machine_report(self):
        report = describe()
        assert report["level"] in ("portable", "avx2", "avx512", "avx512_bf16", "amx")
        assert report["threads"] == torch.get_num_threads()


class TestReport:
    def test_json_and_plot(self, tmp_path):
        pytest.importorskip("matplotlib")
        from fastmoe_route.bench.plot import plot_report

        results = [run_tiny(row) for row in rows_of("gate", "permute")]
        results.append(runner.Result(results[0].row, skipped="no memory"))
        options = runner.Options(seed=3)
        report = runner.as_report(results, tiny_limits(), options, 1.0)
        again = json.loads(json.dumps(report))
        assert again["schema_version"] == runner.SCHEMA_VERSION
        assert again["versions"]["torch"] == torch.__version__
        assert again["seed"] == 3
        row = again["rows"][0]
        assert {"op", "shape", "tokens", "dtype", "pass", "check", "limit", "ratios"} <= set(row)
        for summary in (*row["seconds"].values(), *row["ratios"].values()):
            assert 0 < summary["p10"] <= summary["median"] <= summary["p90"]
        assert row["check"]["passed"]
        assert again["rows"][-1]["skipped"] == "no memory"
        plot_report(again, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size > 10_000

    def test_wrong_rows_are_loud(self, capsys):
        result = runner.Result(rows_of("gate")[0], [check.Finding("values", False, 1.0, 0.1)])
        reporter = Reporter(1)
        reporter.finish(result)
        reporter.tail([result], 1.0, None, None)
        out, err = capsys.readouterr()
        assert "WRONG: values: error 1, allowed 0.1" in out
        assert "1 WRONG RESULT(S): gate 64,32,8,2 T=12 float32 fwd" in err


def test_the_checks_that_are_timed_stand_in_the_kernel() -> None:
    with script("tools", "validation_cost") as tool:
        text = (tool.ROOT / tool.COUNTING).read_text()
        bare = tool.without_checks(text)
        assert len(bare) == len(text) - sum(map(len, tool.CHECKS))
        with pytest.raises(SystemExit, match=r"count_bins\.cpp: must hold this once, got 0 times"):
            tool.without_checks(bare)


@pytest.mark.large
def test_checking_every_id_stays_a_small_part() -> None:
    """The bar is 2% of a call, and less is recorded (bench/README.md); other machines differ."""
    with script("tools", "validation_cost") as tool:
        for row in tool.measure(3.0)["rows"]:
            assert row["share_of_call"]["median"] < 0.04, row
