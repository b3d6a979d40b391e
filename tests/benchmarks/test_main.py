"""What `python -m benchmarks` writes."""

import pytest

from benchmarks.__main__ import main, write
from benchmarks.registry import benchmark, results


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_a_number_that_json_lacks_is_never_written(tmp_path, number):
    result = {"name": "table2", "rows": [{"saved": number}]}
    with pytest.raises(ValueError, match="the result of table2 holds a number that JSON does not have"):
        write(benchmark("table2"), result, {"md": "", "figures": {}}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_device_keeps_its_speeds_when_another_is_measured(tmp_path):
    entry = benchmark("speed")

    def measured(device, date, speed):
        result = {"name": "speed", "conditions": {"device": device, "date": date}, "speed": speed}
        write(entry, result, {"md": "", "figures": {}}, tmp_path)

    measured("x86_64 CPU (AVX512, bf16 products)", "2026-01-01T00:00:00+00:00", 1)
    measured("x86_64 CPU (AVX2)", "2026-01-02T00:00:00+00:00", 2)
    measured("x86_64 CPU (AVX512, bf16 products)", "2026-01-03T00:00:00+00:00", 3)
    assert [path.name for path in entry.files(tmp_path)] == [
        "speed-x86-64-cpu-avx512-bf16-products.json",
        "speed-x86-64-cpu-avx2.json",
    ]
    assert [result["speed"] for result in results("speed", tmp_path)] == [3, 2], "the newest first"
    assert [result["speed"] for result in results("speed-x86-64-cpu-avx2", tmp_path)] == [2]


@pytest.mark.parametrize(
    ("name", "option"), [("retrain", "--list"), ("patchrank-runs", "--seeds"), ("report", "--page")]
)
def test_help_behind_an_action_is_that_of_the_action(name, option, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0 and option in capsys.readouterr().out


def test_help_behind_a_benchmark_is_the_general_one(capsys):
    assert main(["table2", "--help"]) == 0
    assert "environment: SMOKE=1" in capsys.readouterr().out
