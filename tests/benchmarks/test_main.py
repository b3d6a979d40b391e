"""What `python -m benchmarks` writes."""

import pytest

from benchmarks.__main__ import write


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_a_number_that_json_lacks_is_never_written(tmp_path, number):
    result = {"name": "table2", "rows": [{"saved": number}]}
    with pytest.raises(ValueError, match="the result of table2 holds a number that JSON does not have"):
        write(result, {"md": "", "figures": {}}, tmp_path)
    assert not list(tmp_path.iterdir())
