"""What the benchmarks of the embedded models share."""

import pytest

from benchmarks import embedded


def test_missing_weights_name_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "TEACHER", tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="make retrain"):
        embedded.models()
