"""How the tables of what models cost read, and the lines about their goals."""

from benchmarks.together.deploy_cases import CASCADE, DENSE, FIRST, WAVE
from benchmarks.together.deploy_engines import REFERENCE
from benchmarks.together.deploy_tables import goals, parts

RUN = {"device": "CPU", "threads": 2, "torch": "2"}


def row(engine, side, point, against, ratio):
    """A row of a table, with the same speed at every batch size and an interval of a point to either side."""
    speed = {"images_per_second": 10 * ratio, "ratios": [ratio] * 3, "ratios_int8": [ratio / 4] * 3}
    found = {"engine": engine, "side": side, "point": point, "accuracy": 0.6, "interval": (0.5, 0.7), "refined": 0.15}
    difference = (against, against - 0.01, against + 0.01)
    return found | {"against": difference, "against_int8": difference, "speed": dict.fromkeys(("1", "8", "32"), speed)}


def test_the_tables_have_speed_accuracy_and_needs():
    rows = [row(REFERENCE, DENSE, "", 0.0, 1.0), row("fast", WAVE, "low", -0.02, 9.0)]
    rows += [row("near", WAVE, "mid", -0.008, 6.0), row("slow", WAVE, "high", 0.0, 4.0)]
    needs = [
        {"engine": REFERENCE, "model": side, "bytes": 2_500_000, "first": {"seconds": 1.5, "peak_bytes": 3e8}}
        for side in (DENSE, WAVE)
    ]
    needs += [{"engine": "near", "model": side, "bytes": 600_000, "first": None} for side in (DENSE, WAVE)]
    table = {"rows": rows, "needs": needs, "pictures": {"test": 2000}, "rounds": 3, "timed": 128}
    table["missing"] = {"torchao": "its process ended with exit code 3"}
    text = "\n".join(parts({"missing": {"OpenVINO": "pip install openvino"}, "tables": {"embedded": table}}, RUN))
    assert "Data: embedded, 2,000 pictures of test." in text and "medians of 3 rounds" in text
    assert "| fast | WaveCLIP low | 60.0 [50.0, 70.0] | -2.0 [-3.0, -1.0] | 15.0 % | 90.0 (×9.00, ×2.25) |" in text
    assert "| PyTorch fp32 | 2.5 | 1.50 | 300 | 2.5 | 1.50 | 300 |" in text and "| near | 0.6 | – | – |" in text
    assert "Not measured: OpenVINO (pip install openvino)." in text
    assert "Not measured: torchao (its process ended with exit code 3)." in text
    costs = {**table, "pictures": {}, "rows": [{**row(REFERENCE, DENSE, "", 0.0, 1.0)}]}
    text = "\n".join(parts({"missing": {}, "tables": {"random": costs}}, RUN))
    assert "Random weights of ViT-B/16's size: costs alone." in text and "accuracy" not in text


def test_a_table_says_its_own_machine_and_what_its_models_had():
    needs = [{"engine": REFERENCE, "model": side, "bytes": 10**6, "first": None} for side in (DENSE, WAVE, CASCADE)]
    rows = [row(REFERENCE, *of) for of in ((DENSE, "", 0.0, 1.0), (WAVE, "low", 0.0, 2.0), (CASCADE, "low", 0.01, 3.0))]
    table = {"rows": rows, "needs": needs}
    table |= {"pictures": {"test": 9}, "rounds": 3, "timed": 8, "missing": {}}
    result, other = {"missing": {}, "tables": {"a": table}}, {"device": "CPU (AVX2)", "threads": 4, "torch": "3"}
    text = "\n".join(parts(result, RUN))
    assert "between its turns. CPU, 2 threads, torch 2." in text and "Training" not in text
    assert "| cascade: MB | cascade: s to 32 answers | cascade: peak MB |" in text
    table |= {"conditions": other, "steps": {DENSE: 5000, WAVE: 3000, FIRST: 7000}}
    text = "\n".join(parts(result, RUN))
    assert "between its turns. CPU (AVX2), 4 threads, torch 3." in text
    assert "Training steps: dense 5,000; WaveCLIP 3,000 after those of dense, its teacher: 8,000." in text
    assert "The cascade's first model has 7,000 at half the resolution, its second is dense: 12,000." in text


def test_a_goal_is_reached_by_the_fastest_row_that_is_surely_near_enough():
    rows = [row(REFERENCE, DENSE, "", 0.0, 1.0), row("fast", WAVE, "low", -0.005, 9.0)]
    rows += [row("near", WAVE, "mid", 0.001, 7.0), row("slow", WAVE, "high", 0.006, 4.0)]
    (text,) = goals(rows)
    first, _, third, last = [line for line in text.splitlines() if line.startswith("- ")]
    assert first == (
        "- batch 1, 5 × dense PyTorch fp32 within 1 point: reached. ×7.00 [7.00, 7.00] at +0.1 [-0.9, +1.1] points by "
        "WaveCLIP mid, near (the fastest of 2 near enough)."
    )
    assert third.startswith(
        "- batch 1, 1.5 × dense ONNX Runtime int8 within 0.5 point: NOT reached. ×1.00 [1.00, 1.00]"
    )
    assert last.startswith("- batch 8, 1.5 ×") and "by WaveCLIP high, slow (the fastest of 1 near enough)" in last


def test_the_cascade_has_a_line_for_each_goal_behind_those_of_waveclip():
    rows = [row("slow", WAVE, "high", 0.006, 4.0), row("fast", CASCADE, "low", 0.02, 8.0)]
    (text,) = goals(rows)
    *waves, fp32, int8 = [line for line in text.splitlines() if line.startswith("- ")]
    assert len(waves) == 4 and all("by WaveCLIP high, slow" in line for line in waves)
    outcome = (
        "reached. ×8.00 [8.00, 8.00] at +2.0 [+1.0, +3.0] points by cascade low, fast (the fastest of 1 near enough)."
    )
    assert fp32 == (
        f"- its control, the cascade, 5 × dense PyTorch fp32 within 1 point. Batch 1: {outcome} Batch 8: {outcome}"
    )
    assert int8.startswith(
        "- its control, the cascade, 1.5 × dense ONNX Runtime int8 within 0.5 point. Batch 1: reached."
    )


def test_where_no_row_is_near_enough_the_most_accurate_one_is_named():
    (text,) = goals([row("a", WAVE, "low", -0.03, 9.0), row("b", WAVE, "high", -0.02, 6.0)])
    assert text.count("NOT reached.") == 4
    assert "at -2.0 [-3.0, -1.0] points by WaveCLIP high, b (the most accurate of 2; none is near enough)." in text
